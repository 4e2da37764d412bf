from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hooktuner.config import RunConfig
from hooktuner.data.buckets import Bucket
from hooktuner.data.loader import Loader, Sample, sigma_law
from hooktuner.errors import DataError
from safetensors.torch import save_file

WIDE, TALL = Bucket(64, 32, 5), Bucket(32, 64, 5)


@pytest.fixture
def samples(tmp_path):
    """Five wide and three tall samples; every caption is a tensor of its own number."""
    made = []
    save_file({"number": torch.tensor([-1.0])}, tmp_path / "empty")
    for number in range(8):
        bucket = WIDE if number < 5 else TALL
        shape = (2, 2, bucket.height // 8, bucket.width // 8)
        latents, captions = tmp_path / f"latents-{number}", [tmp_path / f"text-{number}-{k}" for k in range(3)]
        save_file({"latents": torch.full(shape, number + 0.5).bfloat16(), "first_latent": torch.ones(2, 1)}, latents)
        save_file({"mean": torch.full((3,), number).half()}, tmp_path / f"features-{number}")
        for k, caption in enumerate(captions):
            save_file({"number": torch.tensor([number * 10.0 + k])}, caption)
        made.append(Sample(f"set/{number}.mp4", bucket, latents, tuple(captions), tmp_path / f"features-{number}"))
    return made


@pytest.fixture
def make_loader(samples, tmp_path):
    def make(chosen=None, **config):
        values = {"train_batch_size": 2, "seed": 3, "flow_schedule_shift": 2.0, **config}
        return Loader(
            samples if chosen is None else chosen, RunConfig.model_validate(values), empty_caption=tmp_path / "empty"
        )

    return make


def same(one, two):
    assert (one.keys, one.index, one.pixels) == (two.keys, two.index, two.pixels)
    for name in ("latents_BCFHW", "noise_BCFHW", "sigma_B"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    for name in ("extras", "features"):
        left, right = getattr(one, name), getattr(two, name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert [text["number"] for text in one.text] == [text["number"] for text in two.text]
    return True


def test_an_epoch_shows_every_sample_once_and_loses_none(make_loader):
    loader = make_loader()
    assert (loader.samples_per_epoch, loader.micros_per_epoch) == (8, 5)  # 2+2+1 wide, 2+1 tall
    for epoch in range(3):
        micros = range(5 * epoch, 5 * epoch + 5)
        batches = [loader.batch(micro) for micro in micros]
        keys = Counter(key for batch in batches for key in batch.keys)
        assert keys == Counter(f"set/{number}.mp4" for number in range(8))
        assert [index for batch in batches for index in batch.index] == list(range(8 * epoch, 8 * epoch + 8))
        assert [loader.count(micro) for micro in micros] == [len(batch.index) for batch in batches]
        assert {loader.epoch(micro) for micro in micros} == {epoch}


def test_a_batch_has_one_shape_and_its_samples_latents(make_loader):
    loader = make_loader()
    for micro in range(5):
        batch = loader.batch(micro)
        frames, height, width = batch.pixels
        assert frames == 5
        assert batch.latents_BCFHW.shape == (len(batch.index), 2, 2, height // 8, width // 8)
        assert batch.latents_BCFHW.dtype == batch.noise_BCFHW.dtype == batch.sigma_B.dtype == torch.float32
        assert batch.noise_BCFHW.shape == batch.latents_BCFHW.shape
        for row, key in enumerate(batch.keys):
            number = int(key.removeprefix("set/").removesuffix(".mp4"))
            assert (batch.latents_BCFHW[row] == number + 0.5).all()
            assert (batch.features["mean"][row] == number).all()
        assert batch.features["mean"].dtype == torch.float16
        assert batch.extras["first_latent"].shape == (len(batch.index), 2, 1)
        assert "first_frame" not in batch.extras


def test_epochs_and_seeds_have_orders_of_their_own(make_loader):
    def order(loader, epoch):
        return [tuple(loader.batch(5 * epoch + k).keys) for k in range(5)]

    loader = make_loader()
    assert order(loader, 0) != order(loader, 1)
    assert order(loader, 0) != order(make_loader(seed=4), 0)
    # buckets alternate: they are not simply put one behind the other
    kinds = {tuple(loader.batch(5 * epoch + k).pixels[1] for k in range(5)) for epoch in range(6)}
    assert len(kinds) > 2


def test_a_batch_is_a_pure_function_of_its_number(make_loader):
    first, second = make_loader(), make_loader()
    forwards = [first.batch(micro) for micro in range(12)]
    for micro in reversed(range(12)):
        same(forwards[micro], second.batch(micro))


_DRAW = """
import sys, hashlib, torch
from pathlib import Path
from hooktuner.config import RunConfig
from hooktuner.data.buckets import Bucket
from hooktuner.data.loader import Loader, Sample
folder = Path(sys.argv[1])
samples = [Sample(f"s/{n}", Bucket(64, 32, 5), folder / f"latents-{n}", (folder / f"text-{n}-0",)) for n in range(5)]
config = RunConfig.model_validate({"train_batch_size": 2, "seed": 3})
batch = Loader(samples, config, empty_caption=folder / "empty").batch(7)
print(batch.keys, batch.index, batch.sigma_B.numpy().tobytes().hex(),
      hashlib.sha256(batch.noise_BCFHW.numpy().tobytes()).hexdigest())
"""


def test_another_process_draws_the_same_bits(samples, tmp_path):
    command = [sys.executable, "-c", _DRAW, str(tmp_path)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, env={"PYTHONHASHSEED": "7"})
    bare = [replace(sample, key=f"s/{n}", captions=sample.captions[:1]) for n, sample in enumerate(samples[:5])]
    config = RunConfig.model_validate({"train_batch_size": 2, "seed": 3})
    batch = Loader(bare, config, empty_caption=tmp_path / "empty").batch(7)
    noise = hashlib.sha256(batch.noise_BCFHW.numpy().tobytes()).hexdigest()
    sigma = batch.sigma_B.numpy().tobytes().hex()
    assert ended.stdout == f"{batch.keys} {batch.index} {sigma} {noise}\n"


def test_draws_belong_to_a_sample_and_not_to_its_batch(make_loader, samples):
    """Batch sizes that keep the order give each number the same noise, σ, dropout and caption."""
    one = make_loader(samples[:1], train_batch_size=1, caption_dropout_probability=0.5)
    two = make_loader(samples[:1], train_batch_size=8, caption_dropout_probability=0.5)
    for micro in range(6):
        assert same(one.batch(micro), two.batch(micro))
    batch = make_loader(samples[:5], train_batch_size=5).batch(0)
    alone = make_loader(samples[:1], train_batch_size=1)
    for row, index in enumerate(batch.index):
        other = alone.batch(index)
        assert torch.equal(batch.noise_BCFHW[row], other.noise_BCFHW[0])
        assert batch.sigma_B[row] == other.sigma_B[0]


def test_views_and_epochs_have_noise_of_their_own(make_loader, samples):
    views = [samples[0], replace(samples[0], key="set/0.mp4 [view 1]")]
    batch = make_loader(views).batch(0)
    assert not torch.equal(batch.noise_BCFHW[0], batch.noise_BCFHW[1])
    assert batch.sigma_B[0] != batch.sigma_B[1]
    assert sorted(batch.keys) == ["set/0.mp4", "set/0.mp4 [view 1]"]


def test_captions_are_drawn_evenly_and_dropped_as_often_as_asked(make_loader, samples):
    drawn = Counter()
    loader = make_loader(samples[:1], train_batch_size=1, caption_dropout_probability=0.25)
    for micro in range(2000):
        drawn[loader.batch(micro).text[0]["number"].item()] += 1
    assert set(drawn) == {-1.0, 0.0, 1.0, 2.0}
    assert drawn[-1.0] == pytest.approx(500, abs=80)
    for caption in (0.0, 1.0, 2.0):
        assert drawn[caption] == pytest.approx(500, abs=80)
    for probability, expected in ((0, {0.0, 1.0, 2.0}), (1, {-1.0})):
        loader = make_loader(samples[:1], train_batch_size=1, caption_dropout_probability=probability)
        assert {loader.batch(micro).text[0]["number"].item() for micro in range(50)} == expected


@pytest.mark.parametrize(
    ("config", "mean", "spread"),
    [
        ({"flow_schedule_shift": 1.0}, 0.5, 0.208),  # sigmoid(N(0,1))
        ({"flow_schedule_shift": 1.0, "flow_sigmoid_scale": 3.0}, 0.5, 0.364),
        ({"flow_schedule_shift": 1.0, "flow_use_uniform_schedule": True}, 0.5, 0.2887),
        ({"flow_schedule_shift": 3.0, "flow_use_uniform_schedule": True}, 0.676, 0.2666),
        (
            {
                "flow_schedule_shift": 1.0, "flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 4.0,
                "flow_beta_schedule_beta": 2.0,
            },
            0.667,
            0.178,
        ),
    ],
)  # fmt: skip
def test_sigma_follows_the_law_of_the_config(make_loader, samples, config, mean, spread):
    loader = make_loader(samples[:5], train_batch_size=5, **config)
    sigma = torch.cat([loader.batch(micro).sigma_B for micro in range(400)])
    assert sigma.mean().item() == pytest.approx(mean, abs=0.02)
    assert sigma.std().item() == pytest.approx(spread, abs=0.02)
    assert ((sigma > 0) & (sigma < 1)).all()


def test_laws():
    assert sigma_law(RunConfig.model_validate({})) == "sigmoid"
    assert sigma_law(RunConfig.model_validate({"flow_use_uniform_schedule": True})) == "uniform"
    assert sigma_law(RunConfig.model_validate({"flow_use_beta_schedule": True})) == "beta"


def test_first_frame_says_which_samples_have_theirs_given(make_loader, samples):
    marked = [replace(sample, first_frame=number % 2 == 0) for number, sample in enumerate(samples)]
    batches = [make_loader(marked).batch(micro) for micro in range(5)]
    for batch in batches:
        wanted = [int(key.removeprefix("set/").removesuffix(".mp4")) % 2 == 0 for key in batch.keys]
        assert batch.extras["first_frame"].dtype == torch.bool
        assert batch.extras["first_frame"].tolist() == wanted


def test_streaming_gives_the_batches_in_order(make_loader):
    loader = make_loader()
    streamed = list(loader.stream([4, 0, 9, 9], prefetch=2))
    assert len(streamed) == 4
    for micro, batch in zip([4, 0, 9, 9], streamed, strict=True):
        same(batch, make_loader().batch(micro))


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_closing_a_stream_ends_its_thread(make_loader):
    made = []

    class Counted(Loader):
        def batch(self, micro):
            made.append(micro)
            return super().batch(micro)

    loader = make_loader()
    stream = Counted(loader.samples, loader.config, empty_caption=loader.empty_caption).stream(
        iter(range(10**9)), prefetch=2
    )
    assert next(stream).index[0] == 0
    assert len(loader_threads()) == 1
    stream.close()
    assert loader_threads() == []
    assert len(made) <= 5  # one given, two waiting, one in hand, and one that the closing let through


def test_an_exception_of_the_thread_arrives_and_names_the_sample(make_loader, samples):
    samples[2].latents.unlink()
    stream = make_loader().stream(range(5))
    with pytest.raises(DataError, match=r"^set/2.mp4 — its cache entry .*latents-2 is gone\. Start the run again"):
        list(stream)
    assert loader_threads() == []


def test_the_fingerprint_tells_other_data_and_batches(make_loader, samples):
    print_of = make_loader().fingerprint
    assert make_loader().fingerprint == print_of
    assert make_loader(learning_rate=0.5).fingerprint == print_of
    others = [
        make_loader(samples[:-1]),
        make_loader(samples[::-1]),
        make_loader([replace(samples[0], latents=samples[1].latents), *samples[1:]]),
        make_loader([replace(samples[0], captions=samples[0].captions[:1]), *samples[1:]]),
        make_loader(train_batch_size=3),
        make_loader(seed=9),
    ]
    assert len({print_of, *(loader.fingerprint for loader in others)}) == 7


def test_no_samples_are_an_error(make_loader):
    with pytest.raises(DataError, match="there is no sample to train on"):
        make_loader([])
