import torch

from weightsmith.lab.data.image_sets import load_images
from weightsmith.lab.data.views import View, labels_of


def test_a_view_gives_chosen_examples_under_other_labels():
    split = load_images("digits", train_examples=60).train
    labels = labels_of(split, chunk=7)
    assert torch.equal(labels, split.labels)
    rows = (labels > 6).nonzero().flatten()
    view = View(split, rows, lambda found: found - 7)
    view.seed = 5
    batch = view.__getitems__([2, 0])
    assert split.seed == view.seed == 5
    assert len(view) == len(rows)
    assert batch.indices.tolist() == [2, 0]
    assert torch.equal(batch.targets, labels[rows[[2, 0]]] - 7)
    assert torch.equal(batch.inputs, split.__getitems__(rows[[2, 0]]).inputs)
