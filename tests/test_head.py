"""The growing head: what is seen, what trains, what no step can move."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avalanche_fmlora.modules.head import UNSEEN_LOGIT, IncrementalHead


def _features(seed: int = 0) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def _train(head: IncrementalHead, classes: list[int], *, decay: float = 0.1) -> None:
    """Three steps with momentum and weight decay, which would move whatever they can reach."""
    head.begin(classes)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5, momentum=0.9, weight_decay=decay)
    target = torch.tensor(classes)[torch.arange(6) % len(classes)]
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(head(_features()), target).backward()
        optimizer.step()


@pytest.mark.parametrize("cosine", [False, True])
def test_logits_are_the_definition(cosine: bool) -> None:
    head = IncrementalHead(4, cosine=cosine, scale=7.0)
    _train(head, [2, 0])
    features, logits = _features(1), head(_features(1))
    assert logits.shape == (6, 3)
    assert torch.equal(logits[:, 1], torch.full((6,), UNSEEN_LOGIT))
    for slot, c in enumerate((0, 2)):
        row = head.active_rows[slot]
        expected = 7 * F.cosine_similarity(features, row[None]) if cosine else features @ row + head.active_bias[slot]
        torch.testing.assert_close(logits[:, c], expected)
    before = logits.detach().clone()
    head.close()
    assert not list(head.parameters())
    assert torch.equal(head(features), before), "closing an experience changes no logit"


@pytest.mark.parametrize("cosine", [False, True])
def test_past_rows_stay_to_the_bit(cosine: bool) -> None:
    head = IncrementalHead(4, cosine=cosine)
    _train(head, [0, 1])
    head.close()
    rows, bias = head.rows.clone(), head.bias.clone()
    _train(head, [2, 4])
    assert head.past.tolist() == [0, 1]
    weights = head.weights()
    head.close()
    assert torch.equal(head.rows[:2], rows[:2])
    assert torch.equal(head.bias[:2], bias[:2])
    assert torch.equal(head.rows, weights.detach())
    assert head.seen.tolist() == [True, True, True, False, True]
    assert head.stored_parameters() == 4 * (4 if cosine else 5)


def test_recurring_classes_train_on_from_where_they_were() -> None:
    head = IncrementalHead(4)
    _train(head, [0, 1])
    head.close()
    rows = head.rows.clone()
    head.begin({1})
    assert torch.equal(head.active_rows.detach(), rows[1:2])
    assert head.past.tolist() == [0]


def test_room_for_future_classes_is_not_having_seen_them() -> None:
    head = IncrementalHead(4)
    _train(head, [0, 1])
    head.grow([5])
    assert head.n_classes == 6
    assert head.seen.tolist() == [True, True, False, False, False, False]
    assert head(_features()).argmax(-1).max() <= 1
    assert torch.isfinite(F.cross_entropy(head(_features()), torch.full((6,), 5)))
    head.grow([2])
    assert head.n_classes == 6


@pytest.mark.parametrize("cosine", [False, True])
def test_writing_rows_touches_no_other_row_even_in_training(cosine: bool) -> None:
    head = IncrementalHead(4, cosine=cosine)
    _train(head, [0, 1, 2])
    trained = head.active_rows.detach().clone()
    new = torch.ones(1, 4)
    head.write(torch.tensor([1]), new)
    assert torch.equal(head.active_rows[1], new[0])
    assert torch.equal(head.active_rows[[0, 2]], trained[[0, 2]])
    assert torch.equal(head.weights()[1], new[0])


def test_first_rows_come_from_the_heads_own_seed() -> None:
    rows = []
    for seed, noise in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(noise)
        head = IncrementalHead(4, cosine=True, seed=seed)
        head.begin([0, 1])
        rows.append(head.active_rows.detach().clone())
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    torch.testing.assert_close(rows[0].norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("open_", [False, True])
def test_state_dict_goes_into_a_head_of_any_size(cosine: bool, open_: bool) -> None:
    head = IncrementalHead(4, cosine=cosine)
    _train(head, [0, 3])
    if not open_:
        head.close()
    buffer = io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    for classes in ([], [0, 1, 2, 3, 4, 5]):
        other = IncrementalHead(4, cosine=cosine)
        if classes:
            other.begin(classes)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer))
        assert torch.equal(other(_features()), head(_features()))
        assert other.active.tolist() == head.active.tolist()


def test_folded_rows_predict_between_experiences_only() -> None:
    head = IncrementalHead(4, scale=7.0)
    _train(head, [0, 1])
    head.close()
    folded = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]])
    plain, one_row = head(_features()), head.stored_parameters()
    head.fold(folded[None])
    torch.testing.assert_close(head(_features()), 7 * F.normalize(_features(), dim=-1) @ folded.T)
    assert head.stored_parameters() == 2 * one_row
    copy = IncrementalHead(4, scale=7.0)
    copy.load_state_dict(head.state_dict())
    assert torch.equal(copy(_features()), head(_features()))
    head.grow([3])
    assert head(_features())[0].tolist()[2:] == [UNSEEN_LOGIT] * 2
    head.begin([2])
    torch.testing.assert_close(head(_features())[:, :2], plain)
    with pytest.raises(ValueError, match="shape"):
        head.fold(folded[None])
    with pytest.raises(ValueError, match="cosine"):
        IncrementalHead(4, cosine=False).fold(torch.zeros(1, 0, 4))


def test_means_of_classes_that_recur_and_of_new_ones_stand_side_by_side() -> None:
    head = IncrementalHead(2)
    head.begin([0, 1])
    head.close()
    head.write(torch.tensor([0, 1]), torch.eye(2))
    head.counts += 4
    head.occurrences += 1
    head.keep_means()
    head.grow([2])
    head.add_means(torch.tensor([1, 2]), torch.full((2, 2), 3.0), torch.tensor([4.0, 4.0]), separate=True)
    assert head.means.tolist() == [[[1, 0], [0, 1], [3, 3]], [[1, 0], [3, 3], [3, 3]]]


@pytest.mark.parametrize("cosine", [False, True])
def test_room_for_classes_to_come_changes_no_bit(cosine: bool) -> None:
    """Products round by their number of rows; a head that an evaluation has made wider is to train as before it."""
    narrow, wide = (IncrementalHead(192, cosine=cosine) for _ in range(2))
    features = torch.randn(33, 192, generator=torch.Generator().manual_seed(1))
    rows = F.normalize(torch.randn(5, 192, generator=torch.Generator().manual_seed(2)), dim=-1)
    found = []
    for head in (narrow, wide):
        head.begin([0, 1, 2, 3, 4])
        head.write(head.active, rows)
        if head is wide:
            head.grow([99])
        x = features.clone().requires_grad_()
        logits = head(x)
        F.cross_entropy(logits[:, :5], torch.arange(33) % 5).backward()
        assert logits.shape == (33, 100 if head is wide else 5)
        assert (logits[:, 5:] == UNSEEN_LOGIT).all()
        found.append((logits[:, :5], x.grad, head.active_rows.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    copy = IncrementalHead(192, cosine=cosine)
    copy.load_state_dict(wide.state_dict())
    assert torch.equal(copy(features), wide(features))
    wide.discard()
    assert (wide(features) == UNSEEN_LOGIT).all()
    assert (copy._reach, wide._reach) == (5, 0)
