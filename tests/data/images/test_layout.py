"""Places of images in the rows of each layout: one that several sequences share stands once in a shared row."""

from __future__ import annotations

import pytest
import torch

from trl_fast.data import Tree, pack_trees
from trl_fast.data.images.inputs import ImageInput
from trl_fast.data.images.layout import ImageLayout

IMAGE = 7
TEXT = [1, 2, 3, 4] * 6  # longer than what is too short to be shared


def image(value, tokens=3, rows=2):
    return ImageInput({"pixel_values": torch.full((rows, 2), float(value))}, tokens)


def with_image(*images):
    """Returns the token ids of text, the images, and text."""
    return TEXT + [IMAGE] * sum(each.num_tokens for each in images) + TEXT


def values(batch):
    """Returns the images of a batch, in order, by the number that fills each."""
    return batch.images["pixel_values"][:, 0].unique_consecutive().tolist()


def pack(trees, layout, kind=None, **options):
    return pack_trees(trees, layout, 0, image_layout=kind or ImageLayout(IMAGE, ("mm_token_type_ids",)), **options)


@pytest.fixture
def trees():
    one, two, three = image(1), image(2, tokens=5, rows=4), image(3)
    return [
        Tree(with_image(one, two), [[10, 11], [12]], images=(one, two)),
        Tree(TEXT, [[13], [14, 15]]),
        # A tool's answer has an image that one completion alone reads.
        Tree(TEXT, [Tree([16, IMAGE, IMAGE, IMAGE], [[17]], images=(three,)), [18]]),
    ]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [("shared_prefix", [1, 2, 3]), ("packed", [1, 2, 1, 2, 3]), ("padded", [1, 2, 1, 2, 3])],
)
def test_each_image_stands_as_often_as_its_tokens(trees, layout, expected):
    batch = pack(trees, layout)
    assert values(batch) == expected
    assert torch.equal(batch.images["mm_token_type_ids"], (batch.input_ids == IMAGE).long())


@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
def test_prompts_of_other_images_are_not_shared(layout):
    """Their token ids are the same."""
    images = image(1), image(2), image(1)
    trees = [Tree(with_image(each), [[20 + number]], images=(each,)) for number, each in enumerate(images)]
    batch = pack(trees, layout, compares_tokens=True)
    assert values(batch) == [1, 2, 1]
    alike = [Tree(tree.prompt_ids, tree.branches, images=(image(1),)) for tree in trees]
    assert values(pack(alike, layout, compares_tokens=True)) == [1]
    if layout == "shared_prefix":
        # The text before the image stands once all the same.
        assert batch.input_ids.shape[1] == 24 + 3 * (3 + 24 + 1)


def test_positions_are_those_of_each_sequence(trees):
    def two_axes(ids, images):
        return torch.stack([torch.arange(len(ids)), torch.tensor(ids)])

    kind = ImageLayout(IMAGE, positions=two_axes)
    for layout in ("shared_prefix", "packed", "padded"):
        batch = pack(trees, layout, kind)
        first, second = batch.position_ids.unbind(0)
        assert torch.equal(second, batch.input_ids)
        for ids, places in zip(batch.sequences(), batch.by_sequence(first), strict=True):
            assert torch.equal(places, torch.arange(len(ids)))


def test_runs_that_see_each_other(trees):
    kind = ImageLayout(IMAGE, sees_both_ways=True)
    batch = pack(trees, "shared_prefix", kind)
    row = batch.input_ids[0]
    # Two images side by side are one run, as they are one to the models that attend so.
    assert [end - start for start, end in batch.image_runs] == [8, 3]
    assert all((row[start:end] == IMAGE).all() for start, end in batch.image_runs)
    assert pack(trees, "shared_prefix").image_runs is None


def test_images_side_by_side_that_see_each_other_are_shared_together():
    """The first image stands alone in one sequence, and beside another one in each of two others."""
    one, two, three = image(1), image(2), image(3)
    branches = [Tree([IMAGE] * 3, [[17]], images=(each,)) for each in (two, three)]
    trees = [Tree(TEXT + [IMAGE] * 3, [[18], *branches], images=(one,))]
    assert values(pack(trees, "shared_prefix")) == [1, 2, 3]
    batch = pack(trees, "shared_prefix", ImageLayout(IMAGE, sees_both_ways=True))
    assert values(batch) == [1, 2, 1, 3] and batch.tree_lengths == ((24, 4, 7, 7),)
    assert batch.image_runs == ((24, 27), (28, 34), (35, 41))


@pytest.mark.parametrize("whole_prompts", [False, True])
def test_image_tokens_without_images_are_named(whole_prompts):
    """Also where no sequence of the batch has images."""
    kind = ImageLayout(IMAGE, ("token_type_ids",), sees_both_ways=True, whole_prompts=whole_prompts)
    for others in ((), (Tree(TEXT, [[20]]),), (Tree(with_image(image(1)), [[20]], images=(image(1),)),)):
        with pytest.raises(ValueError, match="A sequence has 3 image tokens, but its 0 images have 0; .* keep it"):
            pack([*others, Tree(with_image(image(1)), [[20], [21]])], "padded", kind)


def test_whole_prompts_that_see_each_other():
    """Each prompt with images is one run; prompts that only begin alike share nothing."""
    kind = ImageLayout(IMAGE, ("token_type_ids",), sees_both_ways=True, whole_prompts=True)
    one, two = image(1), image(2)
    prompt = with_image(one)
    trees = [
        Tree(prompt, [[18], [19, 20]], images=(one,)),
        Tree([*prompt, 21], [[22]], images=(one,)),
        Tree(prompt, [[23]], images=(two,)),
        Tree(TEXT, [[24], [25]]),
    ]
    batch = pack(trees, "shared_prefix", kind, compares_tokens=True)
    assert batch.tree_lengths == ((51, 1, 2), (53,), (52,), (24, 1, 1))
    assert batch.image_runs == ((0, 51), (54, 106), (107, 158))
    seen = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    for start, end in batch.image_runs:
        seen[0, start:end] = True
    assert torch.equal(batch.images["token_type_ids"], (~seen).long())
    # Text alone is read from left to right, and the model is told so.
    alone = pack(trees[3:], "padded", kind)
    assert set(alone.images) == {"token_type_ids"} and (alone.images["token_type_ids"] == 1).all()
    assert alone.image_runs is None
    padded = pack(trees, "padded", kind).images["token_type_ids"]
    assert (padded == 0).sum(1).tolist() == [51, 51, 52, 51, 0, 0] and (padded.diff() >= 0).all()


def test_batches_without_images_are_as_before():
    trees = [Tree(TEXT, [[13], [14, 15]])]
    batch = pack(trees, "shared_prefix", ImageLayout(IMAGE, positions=lambda ids, images: pytest.fail("is asked")))
    assert batch.images is None and batch.image_runs is None and batch.position_ids.dim() == 2


def test_a_cut_image_is_refused(trees):
    with pytest.raises(ValueError, match="has 7 image tokens, but its 2 images have 8; if max_length"):
        pack(trees, "padded", max_length=31)


def test_moving_and_pinning_take_images_along(trees):
    batch = pack(trees, "shared_prefix").to("meta")
    assert all(tensor.device.type == "meta" for tensor in batch.images.values())


def test_narrower_tensors_are_filled_with_zeros():
    small, large = (ImageInput({"pixel_values": torch.ones(1, tiles, 2)}, 1) for tiles in (1, 3))
    batch = pack([Tree([1, IMAGE, IMAGE], [[5]], images=(small, large))], "packed")
    assert batch.images["pixel_values"].sum(-1).tolist() == [[2, 0, 0], [2, 2, 2]]
