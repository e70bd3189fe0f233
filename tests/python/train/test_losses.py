"""T-Few's losses written out by hand, rank classification, and both under transformers' Trainer."""

import math
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import ferrolora as fl
from ferrolora.train.losses import ChoiceCollator, RankClassification, TFewLoss, choice_losses, choice_scores
from tiny import models

EXAMPLES = [
    {"input_ids": [5, 6, 7], "choices": [[10, 11], [12], [13, 14, 15]], "correct": 1},
    {"input_ids": [8, 9], "choices": [[20, 21, 22], [23, 24]], "correct": 0},
]


def test_the_three_terms_are_those_of_the_paper() -> None:
    logits = torch.randn(3, 2, 5)
    labels = torch.tensor([[1, 2], [3, -100], [0, 4]])
    log_p = logits.log_softmax(-1)
    tokens = [[log_p[0, 0, 1], log_p[0, 1, 2]], [log_p[1, 0, 3]], [log_p[2, 0, 0], log_p[2, 1, 4]]]
    lm = -(tokens[0][0] + tokens[0][1]) / 2
    wrong = [*tokens[1], *tokens[2]]
    unlikelihood = -sum(torch.log(1 - token.exp()) for token in wrong) / 3
    beta = [sum(row) / len(row) for row in tokens]
    normalised = -math.log(beta[0].exp() / sum(b.exp() for b in beta))
    found = choice_losses(logits, labels, choices=3, shift=False)
    torch.testing.assert_close(found.lm, lm)
    torch.testing.assert_close(found.unlikelihood, unlikelihood)
    assert found.length_normalised.item() == pytest.approx(normalised, rel=1e-5)
    torch.testing.assert_close(choice_scores(logits, labels, shift=False), torch.stack(beta))


@pytest.mark.parametrize("shift", [False, True])
def test_rows_without_tokens_are_no_choices(shift: bool) -> None:
    batch = ChoiceCollator(3, 0, shift)(EXAMPLES)
    logits = torch.randn(*batch["labels"].shape, 64)
    losses = choice_losses(logits, batch["labels"], 3, shift)
    assert all(torch.isfinite(loss) for loss in losses)
    assert choice_scores(logits, batch["labels"], shift)[5] == -torch.inf


def test_the_collator_puts_the_correct_choice_first() -> None:
    batch = ChoiceCollator(3, 0)(EXAMPLES)
    assert batch["labels"][0].tolist() == [12, -100, -100]
    assert batch["labels"][3].tolist() == [20, 21, 22]
    assert batch["input_ids"][0].tolist() == [5, 6, 7]
    assert batch["attention_mask"][3].tolist() == [1, 1, 0]
    causal = ChoiceCollator(3, 0, shift=True)(EXAMPLES)
    assert causal["input_ids"][0].tolist() == [5, 6, 7, 12, 0, 0]
    assert causal["labels"][0].tolist() == [-100, -100, -100, 12, -100, -100]


def test_an_example_without_two_choices_is_refused() -> None:
    with pytest.raises(fl.UnsupportedError, match="2 to 3 choices"):
        ChoiceCollator(3, 0)([{"input_ids": [1], "choices": [[2]], "correct": 0}])
    with pytest.raises(fl.ShapeError, match="5 rows are not examples of 3"):
        choice_losses(torch.randn(5, 2, 4), torch.zeros(5, 2, dtype=torch.long), 3, False)


@pytest.mark.parametrize(
    ("maker", "task", "shift"), [(models.t5, "SEQ_2_SEQ_LM", False), (models.llama, "CAUSAL_LM", True)]
)
def test_ia3_learns_to_rank_under_trainer(maker: object, task: str, shift: bool, tmp_path: Path) -> None:
    """T-Few: IA3 with the three losses; a handful of examples is learned by heart."""
    model = fl.get_peft_model(maker(), fl.IA3Config(task_type=task))  # type: ignore[operator]
    examples = [{"input_ids": [a, 3], "choices": [[10 + a], [20 + a], [30 + a]], "correct": a % 3} for a in range(4)]
    rank = RankClassification(3, shift)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=0.3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=ChoiceCollator(3, 0, shift, decoder_start_token_id=None if shift else 0),
        train_dataset=examples,
        eval_dataset=examples,
        compute_loss_func=TFewLoss(3, shift),
        preprocess_logits_for_metrics=rank.scores,
        compute_metrics=rank.accuracy,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.3
    assert after["eval_accuracy"] >= before["eval_accuracy"]
