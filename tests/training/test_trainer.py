"""RecTrainer: the updates of the plain Trainer, for every batch sampler, with packing and with several processes."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import finetune
from reclingua.datasets.collators import IGNORE, CausalLMCollator
from reclingua.datasets.samplers import LengthGroupedBatchSampler
from reclingua.models.architecture import supports_packing
from reclingua.models.chunked_loss import ChunkedCrossEntropy
from reclingua.training.arguments import TuningArguments
from reclingua.training.callbacks import SetEpochCallback
from reclingua.training.throughput import Throughput, format_throughput, training_flops
from reclingua.training.trainer import RecTrainer
from reclingua.training.zero import check_precision
from tests.datasets.test_instructions import build
from tests.helpers.models import OTHERS, make_model
from tests.helpers.scripts import flags, run_processes
from tests.models.test_chunked_loss import with_logits_of_its_own

WITHOUT_PACKING = {"bloom"}


def weights_after(trainer):
    trainer.train()
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("targets", ["last", "all"])
def test_updates_equal_those_of_the_plain_trainer(toy, tmp_path, targets):
    """The loss is the mean over all targets of accumulated batches of unequal size, also where an epoch ends."""
    _, instructions = build(toy, targets)
    tokenizer = instructions.tokenizer
    assert len(LengthGroupedBatchSampler(instructions.lengths(longest=True), 3)) < 18
    args = TuningArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=9,
        learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", save_and_eval_strategy="no", use_cpu=True,
    )  # fmt: skip
    shared = {"args": args, "train_dataset": instructions, "processing_class": tokenizer}
    ours = RecTrainer(
        **shared,
        model=make_model("llama-tied", len(tokenizer), spread=1),
        data_collator=CausalLMCollator(tokenizer),
        batches=LengthGroupedBatchSampler(instructions.lengths(longest=True), 3),
        max_logits_mb=1,
        compute_valid_metrics=None,
        metadata=None,
    )

    class PlainTrainer(transformers.Trainer):
        def get_train_dataloader(self):
            return ours.get_train_dataloader()

    def without_lengths(samples):
        batch = CausalLMCollator(tokenizer)(samples)
        del batch["lengths"]
        return batch

    epochs = SetEpochCallback(instructions.set_epoch, ours.batches.set_epoch)
    model = make_model("llama-tied", len(tokenizer), spread=1)
    theirs = PlainTrainer(model=model, **shared, data_collator=without_lengths, callbacks=[epochs])
    before = {name: weight.clone() for name, weight in theirs.model.state_dict().items()}
    ours_after = weights_after(ours)
    ours.data_collator = without_lengths
    ours.batches.set_epoch(0)
    theirs_after = weights_after(theirs)
    assert_close(ours_after, theirs_after, tolerance=2e-5)
    assert max((theirs_after[name] - before[name]).abs().max() for name in before) > 1e-3


def losses(model, samples, tokenizer, packing, flatten=False):
    batch = CausalLMCollator(tokenizer, packing, flatten)(samples)
    labels, _ = batch.pop("labels"), batch.pop("lengths")
    head = ChunkedCrossEntropy(model, 1)
    model.zero_grad()
    with head.at_labels(labels):
        model(**batch, use_cache=False)
    head.loss.backward()
    return head.loss.item(), {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("flatten", [False, True])
def test_packed_loss_equals_unpacked(toy, architecture, flatten):
    _, instructions = build(toy, "all", only_response=False)
    tokenizer = instructions.tokenizer
    model = make_model(architecture, len(tokenizer), spread=2)
    assert supports_packing(model)
    samples = [instructions[i] for i in range(9)]
    assert len({len(sample["input_ids"]) for sample in samples}) > 2
    loss, gradients = losses(model, samples, tokenizer, packing=False)
    packed, their_gradients = losses(model, samples, tokenizer, packing=True, flatten=flatten)
    assert packed == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(their_gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("name", OTHERS)
def test_supports_packing(name, toy):
    _, instructions = build(toy, "all")
    model = make_model(name, len(instructions.tokenizer), spread=2)
    assert supports_packing(model) == (name not in WITHOUT_PACKING)
    if name not in WITHOUT_PACKING:
        samples = [instructions[i] for i in range(9)]
        loss, _ = losses(model, samples, instructions.tokenizer, packing=False)
        assert losses(model, samples, instructions.tokenizer, packing=True)[0] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "batching",
    [("--per_device_batch_size", 5), ("--max_tokens_per_batch", 300, "--packing")],
    ids=["padded", "packed"],
)
def test_update_of_two_processes_equals_accumulation(script, workshop, tmp_path, batching):
    """Two processes make the updates of one that accumulates two batches; the loss is weighted by targets in both."""
    same = ("--targets", "all", "--max_his_len", 4, "--train_sampling_strategy", "sequential", *batching)
    same += ("--max_steps", 6, "--save_and_eval_strategy", "no", "--optim", "sgd", "--learning_rate", 0.1)
    two = run_processes(2, finetune.main, *flags(workshop, tmp_path / "two", *same))
    assert two.returncode == 0, two.stderr
    code, _, error = script(
        finetune.main, *flags(workshop, tmp_path / "one", *same, "--gradient_accumulation_steps", 2)
    )
    assert code == 0, error
    assert_close(*(load_file(tmp_path / name / "model.safetensors") for name in ("two", "one")))
    assert json.loads((tmp_path / "two/run.json").read_text())["throughput"]["padding"] < 0.25
    assert two.stdout.count("targets/s") == 1 and "% padding" in two.stdout and "peak memory" in two.stdout


def test_model_without_chunked_loss_trains_by_its_own_loss(toy, tmp_path, capsys):
    _, instructions = build(toy, "last")
    tokenizer = instructions.tokenizer
    model = with_logits_of_its_own(make_model("llama", len(tokenizer), spread=1))
    args = TuningArguments(output_dir=str(tmp_path), max_steps=2, save_and_eval_strategy="no", use_cpu=True)
    trainer = RecTrainer(
        model=model,
        args=args,
        train_dataset=instructions,
        processing_class=tokenizer,
        data_collator=CausalLMCollator(tokenizer),
        batches=LengthGroupedBatchSampler(instructions.lengths(longest=True), 3),
        max_logits_mb=1,
        compute_valid_metrics=None,
        metadata=None,
    )
    assert "applied at every position" in capsys.readouterr().out
    assert trainer.train().training_loss > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max_tokens_per_batch", 10), "should be"),
        (("--max_tokens_per_batch", 100, "--train_sampling_strategy", "random"), "needs --packing"),
        (("--train_sampling_strategy", "batch_rebalance"), "one of group_by_length, random, sequential"),
        (("--label_smoothing_factor", 0.1), "--label_smoothing_factor"),
        (("--auto_find_batch_size",), "give --max_tokens_per_batch"),
        (("--dataloader_persistent_workers",), "--dataloader_persistent_workers"),
        (("--torch_compile", "--torch_compile_mode", "max-autotune"), "--torch_compile has one mode"),
        (("--torch_compile_backend", "inductor"), "takes inductor"),
        (("--enable_jit_checkpoint",), "SIGTERM always saves"),
        (("--push_to_hub", "--hub_strategy", "checkpoint"), "--hub_strategy"),
        (("--max_logits_mb", 0), "--max_logits_mb"),
        (("--per_device_batch_size", 0), "--per_device_batch_size 1"),
        (("--report_to", "tensorboard"), "pip install tensorboard"),
        (("--report_to", "comet_ml"), "pip install comet-ml"),
        (("--report_to", "paper"), "--report_to paper: should be none, all or one of azure_ml"),
        (("--use_liger_kernel",), "pip install liger-kernel" if torch.cuda.is_available() else "needs a GPU"),
    ],
)
def test_bad_flags(refused, workshop, tmp_path, more, message):
    assert message in refused(finetune.main, *flags(workshop, tmp_path / "out", *more))
    assert not any(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("half", "precision", "advice"),
    [
        ("bf16", "", "add --bf16"),
        ("fp16", "bf16", "add --fp16 --bf16 False"),
        ("bf16", "fp16", "add --bf16 --fp16 False"),
    ],
)
def test_a_deepspeed_file_of_another_precision_than_the_flags(half, precision, advice):
    with pytest.raises(ValueError, match=f"computes in {half}, unlike the flags: {advice}$"):
        check_precision({half: {"enabled": True}}, precision)
    check_precision({half: {"enabled": True}}, half)
    check_precision({half: {"enabled": "auto"}}, precision)


def test_throughput_counts_tokens_targets_and_padding():
    model = make_model("llama", 300, spread=1)
    throughput = Throughput(model, torch.device("cpu"))
    throughput.start()
    labels = torch.full((2, 10), IGNORE)
    labels[0, 7:] = 5
    labels[1, 4] = 5
    throughput.add(labels, torch.tensor([10, 5]), labels.numel())
    with throughput.paused():
        seconds = throughput.seconds
    throughput.stop()
    assert (*throughput.counts.tolist(), throughput.slots) == (4, 15, 125, 20) and throughput.seconds > seconds
    from accelerate import Accelerator

    figures = throughput.figures(Accelerator(cpu=True))
    assert figures["padding"] == 0.25
    assert figures["tokens_per_second"] / figures["targets_per_second"] == pytest.approx(15 / 4)
    assert "25.0% padding" in format_throughput(figures)


def test_training_flops():
    model = make_model("llama", 300, spread=1)
    per_target, per_token, per_square = training_flops(model)
    assert per_target == 6 * 300 * 32
    assert per_token == 6 * (model.num_parameters() - 2 * 300 * 32)
    assert per_square == 6 * 2 * 32
    model.model.layers.requires_grad_(False)
    assert training_flops(model)[1] == pytest.approx(4 / 6 * per_token, rel=1e-2)
