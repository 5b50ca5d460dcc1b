"""Train a model whose weights and activations are on a grid."""
