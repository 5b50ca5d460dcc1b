"""Round the weights of a trained model, with or without calibration data."""
