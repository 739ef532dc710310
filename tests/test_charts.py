"""Charts: what is drawn is where the numbers say."""

from __future__ import annotations

import torch

from ailab.pictures.charts import confusion_image, curves_image, reliability_image


def test_the_darker_a_cell_the_more_of_its_row() -> None:
    """A cell's colour depends on its share of the row alone, so rare classes show as well as frequent ones."""
    matrix = torch.tensor([[900, 100], [1, 9]])
    image = confusion_image(matrix, ["cat", "dog"])
    left = image.width - 20 - 250
    at = {(r, c): image.getpixel((left + c * 48 + 4, left + r * 48 + 4)) for r in range(2) for c in range(2)}
    assert at[0, 0] == at[1, 1] and at[0, 1] == at[1, 0]
    assert sum(at[0, 0]) < sum(at[0, 1])


def test_a_matrix_of_many_classes_is_drawn() -> None:
    """1,000 classes make a picture of some thousand pixels at most, and odd names do no harm."""
    assert max(confusion_image(torch.eye(1000).long(), [str(i) for i in range(1000)]).size) < 2200
    assert confusion_image(torch.zeros(2, 2).long(), ["naïve\n", "猫" * 50]).width < 600


def test_a_curve_goes_through_its_points() -> None:
    """The corners of the unit square are where the frame has them, and a curve has another colour than the paper."""
    line = torch.tensor([0.0, 1.0])
    image = curves_image([("one", line, torch.tensor([0.5, 0.5]))], "recall", "precision")
    colours = {image.getpixel((x, 12 + 210)) for x in (100, 250, 400)}
    assert len(colours) == 1 and colours != {(255, 255, 255)}


def test_an_empty_bin_has_no_bar() -> None:
    """A bar is as high as the accuracy of its bin; a bin without samples has none."""
    count, half = torch.tensor([0, 5]), torch.tensor([0.5, 0.5])
    image = reliability_image(count, half, half)
    bar = (120, 160, 220)
    assert image.getpixel((52 + 105, 12 + 400)) != bar
    assert image.getpixel((52 + 380, 12 + 400)) == bar and image.getpixel((52 + 380, 12 + 150)) != bar
