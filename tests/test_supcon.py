"""supcon.py: both losses, their relations to others, positives, noise, labels and the baseline."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import arguments, checkpoint, metrics, refused, settings, start, write_folder
from conftest import run as run_tiny
from PIL import Image

import common
import simclr
import supcon
from supcon import mislabel, supcon_loss


def run(data, out, *more):
    """A tiny run."""
    return run_tiny("supcon", data, out, *more)


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


# --------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------


def slow_supcon(z, labels, temperature, variant, cap=None):
    """Eq. 2 and 3 for each anchor, term by term; cap: own views, then the next images' in turn."""
    N, V = z.shape[:2]
    views = [(n, v) for n in range(N) for v in range(V)]
    losses = []
    for n, v in views:

        def score(a, anchor=z[n, v]):
            return (anchor @ z[a] / temperature).exp()

        turn = [((n + step) % N, w) for step in range(N) for w in range(V)]
        P = [a for a in turn if a != (n, v) and labels[a[0]] == labels[n]][:cap]
        A = [a for a in views if a != (n, v)]
        if P:
            shares = [score(p) / sum(score(a) for a in A) for p in P]
            out = sum(torch.log(s) for s in shares) / len(P)
            losses.append(-(out if variant == "out" else torch.log(sum(shares) / len(P))))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize(
    ("shape", "labels", "cap"),
    [
        ((5, 1, 4), [0, 1, 0, 2, 0], None),
        ((4, 2, 3), [0, 0, 1, 2], None),
        ((4, 3, 6), [1, 0, 1, 1], None),
        ((5, 2, 3), [0, 0, 0, 1, 0], 3),
        ((3, 3, 4), [0, 0, 1], 1),
    ],
)
def test_both_losses_and_their_gradients_are_those_of_the_equations(variant, shape, labels, cap):
    torch.manual_seed(len(labels))
    z = (2 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()  # of any length
    labels = torch.tensor(labels)
    ours = supcon_loss(z, labels, 0.7, variant, cap)
    slow = slow_supcon(z, labels, 0.7, variant, cap)
    torch.testing.assert_close(ours, slow, rtol=1e-12, atol=1e-12)
    mine, theirs = (torch.autograd.grad(loss, z)[0] for loss in (ours, slow))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_vectors():
    z = torch.tensor(
        [
            [[0.01, 0.02, 0.14], [0.38, 0.61, 0.50]],
            [[0.86, 0.97, 0.33], [0.26, 0.68, 0.45]],
            [[0.32, 0.64, 0.28], [0.45, 0.74, 0.73]],
        ],
        dtype=torch.float64,
    )
    labels = torch.tensor([0, 0, 1])
    assert abs(supcon_loss(z, labels, 1).item() - 1.685890835910) < 1e-12
    assert abs(supcon_loss(z, labels, 1, "in").item() - 1.644654982217) < 1e-12
    triple = torch.eye(3, dtype=torch.float64)[:, None].expand(3, 2, 3)
    assert abs(supcon_loss(triple, labels, 1).item() - 1.349276885999) < 1e-12


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_a_tetrahedron_gives_ln_3(temperature):
    corners = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).double() / 3**0.5
    for variant in ("out", "in"):
        loss = supcon_loss(corners.view(2, 2, 3), torch.tensor([0, 1]), temperature, variant)
        assert abs(loss.item() - math.log(3)) < 1e-12


def test_equal_embeddings_give_the_chance_that_a_run_shows(few, tmp_path):
    rows = {
        loss: metrics(run(few, tmp_path / loss, "--max-steps", 1, "--loss", loss))
        for loss in ("out", "in", "ce")
    }
    z = torch.ones(4, 2, 3, dtype=torch.float64)
    for variant in ("out", "in"):
        loss = supcon_loss(z, torch.tensor([0, 0, 1, 2]), 0.1, variant).item()
        assert abs(loss - rows[variant][0]["chance"]) < 1e-12
        assert rows[variant][0]["chance"] == math.log(7)
    assert rows["ce"][0]["chance"] == math.log(3)


@pytest.mark.parametrize("variant", ["out", "in"])
def test_anchors_without_a_positive_are_left_out(variant):
    z, labels = unit(4, 1, 5), torch.tensor([0, 1, 0, 2])
    whole = slow_supcon(z, labels, 0.1, variant)  # of two anchors
    torch.testing.assert_close(supcon_loss(z, labels, 0.1, variant), whole)


@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("shape", [(3, 1, 4), (1, 1, 4)])
def test_a_batch_without_positives_gives_0_with_a_gradient_of_0(variant, shape):
    z = unit(*shape).requires_grad_()
    loss = supcon_loss(z, torch.arange(len(z)), 0.1, variant)
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, z)[0], torch.zeros_like(z))


@pytest.mark.parametrize("variant", ["out", "in"])
def test_a_batch_of_one_class_is_no_special_case(variant):
    z, labels = unit(3, 2, 4), torch.zeros(3, dtype=torch.long)
    ours = supcon_loss(z, labels, 0.5, variant)
    torch.testing.assert_close(ours, slow_supcon(z, labels, 0.5, variant))


@pytest.mark.parametrize("temperature", [0.001, 0.1])
def test_low_temperatures_and_rounded_embeddings_stay_finite(temperature):
    for variant in ("out", "in"):
        z = unit(8, 2, 4).bfloat16().requires_grad_()
        loss = supcon_loss(z.float(), torch.arange(8) // 3, temperature, variant)
        assert loss.isfinite() and torch.autograd.grad(loss, z)[0].isfinite().all()


def test_it_refuses_other_shapes_variants_and_caps():
    z, labels = torch.rand(3, 2, 4), torch.arange(3)
    for wrong in (
        (z[:, 0], labels, 1),
        (z, labels[:2], 1),
        (z, labels[:, None], 1),
        (z, labels, 1, "ce"),
        (z, labels, 1, "out", 0),
    ):
        with pytest.raises(ValueError, match=r"z must be|max_positives"):
            supcon_loss(*wrong)


# --------------------------------------------------------------------------------------
# Relations
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["out", "in"])
def test_unique_labels_give_nt_xent_and_so_does_one_positive(variant):
    z, labels = unit(5, 2, 6), torch.tensor([0, 0, 1, 0, 1])
    nt_xent = simclr.nt_xent(z[:, 0], z[:, 1], 0.3)
    torch.testing.assert_close(supcon_loss(z, torch.arange(5), 0.3, variant), nt_xent)
    torch.testing.assert_close(supcon_loss(z, labels, 0.3, variant, 1), nt_xent)


def test_one_positive_and_many_negatives_give_the_n_pairs_loss():
    z = torch.randn(6, 1, 4, dtype=torch.float64)
    labels, total = torch.arange(6) % 3, 0
    for a in range(6):
        p = (a + 3) % 6
        others = [z[a, 0] @ z[n, 0] - z[a, 0] @ z[p, 0] for n in range(6) if n not in (a, p)]
        total = total + torch.log1p(sum(map(torch.exp, others)))
    torch.testing.assert_close(supcon_loss(z, labels, 1), total / 6)


def test_one_positive_and_one_negative_give_the_triplet_loss_to_second_order():
    torch.manual_seed(0)
    directions, rest = torch.randn(3, 5, dtype=torch.float64), []
    for scale in (0.1, 0.05):  # distances halved: the rest falls to a sixteenth
        a, p, n = F.normalize(torch.ones(5, dtype=torch.float64) + scale * directions, dim=1)
        loss = supcon_loss(torch.stack([a, p, n])[:, None], torch.tensor([0, 0, 1]), 0.1)
        from_a = (a - p).square().sum() - (a - n).square().sum()
        from_p = (a - p).square().sum() - (p - n).square().sum()
        triplet = math.log(2) + (from_a + from_p) / 2 / (4 * 0.1)
        rest.append((loss - triplet).item())
    assert rest[0] / rest[1] == pytest.approx(16, rel=0.1) and abs(rest[1]) < 1e-3


def test_l_in_is_never_above_l_out():  # the paper's §3.2.2, by Jensen
    for _ in range(20):
        z, labels = unit(6, 2, 4), torch.randint(3, (6,))
        assert supcon_loss(z, labels, 0.1, "in") <= supcon_loss(z, labels, 0.1, "out") + 1e-12


# --------------------------------------------------------------------------------------
# Noise, labels
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_label_noise_makes_just_that_share_wrong_evenly(share):
    labels = torch.arange(5).repeat(2000)
    noisy = mislabel(labels, 5, share, 3)
    assert (noisy != labels).sum().item() == round(share * 10000)
    wrong = ((noisy - labels) % 5)[noisy != labels].bincount(minlength=5)[1:]
    assert (wrong - wrong.double().mean()).abs().max() < 5 * 50
    assert noisy.unique().numel() == 5 and torch.equal(noisy, mislabel(labels, 5, share, 3))
    assert share != 0.4 or not torch.equal(noisy, mislabel(labels, 5, share, 4))


def test_training_sees_the_noise_and_the_evaluation_does_not(few, tmp_path, monkeypatch):
    seen, banks = [], []
    loss, knn = supcon.supcon_loss, common.knn_accuracy
    monkeypatch.setattr(supcon, "supcon_loss", lambda z, y, *a: seen.append(y) or loss(z, y, *a))
    monkeypatch.setattr(
        common, "knn_accuracy", lambda e, bank, *a: banks.append(bank.labels) or knn(e, bank, *a)
    )
    run(few, tmp_path / "run", "--batch-size", 27, "--label-noise", 0.5, "--epochs", 1)
    true = torch.arange(3).repeat_interleave(9)
    assert all(torch.equal(labels, true) for labels in banks) and banks
    index = common.epoch_order(27, 0, 0)
    assert torch.equal(seen[0], mislabel(true, 3, 0.5, 0)[index])


def test_images_without_classes_or_of_one_class_are_refused(few, tmp_path, capsys):
    out = tmp_path / "run"
    error = refused(capsys, supcon.main, arguments("supcon", few / "train" / "along", out))
    assert "no labels" in error
    for part in ("train", "test"):
        (tmp_path / "one" / part).mkdir(parents=True)
        (tmp_path / "one" / part / "a").symlink_to(few / part / "along")
    for argv in (
        arguments("supcon", tmp_path / "one", out),
        arguments("supcon", few, out, "--limit 1"),
    ):
        assert "single class" in refused(capsys, supcon.main, argv)


def test_a_folder_that_gained_a_class_is_refused(tmp_path, capsys):
    folder, more = write_folder(tmp_path / "data", 4), "--max-steps 1 --loss ce"
    out = run(folder, tmp_path / "run", more)
    (out / "results.json").unlink()
    for part in ("train", "test"):
        (folder / part / "more").symlink_to(folder / part / "along")
    error = refused(capsys, supcon.main, arguments("supcon", folder, out, more))
    assert "classes was 3" in error


def test_the_classifier_has_an_output_for_classes_that_limit_left_out(few, tmp_path):
    out = run(few, tmp_path / "run", "--limit", 6, "--loss", "ce", "--max-steps", 1)
    state = checkpoint(out)["model"]
    assert state["2.weight"].shape[0] == 3 and metrics(out)[0]["chance"] == math.log(3)


def test_many_anchors_without_another_of_their_class_are_warned_of(few, tmp_path, capsys):
    run(few, tmp_path / "few", "--max-steps 1")  # (2/3)^3 of 3 equal classes
    assert "about 30 % of the 4 images of a batch are alone" in capsys.readouterr().out
    run(few, tmp_path / "many", "--max-steps 1 --batch-size 27")
    run(few, tmp_path / "ce", "--max-steps 1 --loss ce")
    assert "alone in their class" not in capsys.readouterr().out


def test_by_default_batches_are_large_enough_for_the_number_of_classes(tmp_path, capsys):
    for n in range(240):
        file = tmp_path / "images" / "train" / f"class {n % 40}" / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (n, 255 - n, n // 2)).save(file)
    shutil.copytree(tmp_path / "images" / "train", tmp_path / "images" / "test")
    words = f"--data {tmp_path}/images --arch small --epochs 1 --workers 1 --out {tmp_path}/run"
    supcon.main(words.split())
    # 32 images of 40 classes would leave nearly half of them alone in their class.
    assert settings(tmp_path / "run")["batch_size"] == 128
    assert "alone in their class" not in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["out", "in", "ce"])
def test_a_loss_at_chance_is_warned_of_and_one_that_falls_is_not(
    loss, few, tmp_path, capsys, monkeypatch
):
    real, entropy = F.normalize, F.cross_entropy
    if loss == "ce":
        monkeypatch.setattr(F, "cross_entropy", lambda z, *a, **k: entropy(0 * z, *a, **k))
    else:  # all at one point
        monkeypatch.setattr(F, "normalize", lambda z, **k: real(0 * z + 1, **k))
    run(few, tmp_path / "stuck", "--loss", loss)
    assert "stays at chance" in capsys.readouterr().out
    monkeypatch.undo()
    more = "--batch-size 8 --epochs 12 --optimizer adamw --lr 0.003 --crop-scale 0.8"
    run(few, tmp_path / "falls", "--augment crop --loss", loss, more)
    lines = capsys.readouterr().out.splitlines()
    last = next(i for i, line in enumerate(lines) if line.split()[:1] == ["12"])
    assert not lines[last + 1].startswith("warning")


def test_the_baseline_reports_its_own_classifier(few, tmp_path, capsys):
    more = "--loss ce --batch-size 9 --epochs 20 --optimizer adamw --lr 0.01 --crop-scale 0.9"
    out = run(few, tmp_path / "run", more, "--color-strength 0.1")
    rows = metrics(out)
    assert rows[-1]["classifier"] > 60 and rows[-1]["loss"] < rows[0]["loss"] - 0.3
    state = checkpoint(out)["model"]
    encoder = common.load_encoder(out / "encoder.safetensors")[0]
    test = common.load_splits(str(few), "", None, torch.device("cpu"), 1)[2]
    normalize = common.Normalize(*common.STATISTICS["imagenet"])
    h = common.extract_features(torch.nn.Sequential(normalize, encoder), test, 12)
    scores = h @ state["2.weight"].T + state["2.bias"]
    assert common.accuracy(scores, test.labels) == pytest.approx(rows[-1]["classifier"])
    first, *others = json.loads((out / "results.json").read_text())
    assert first["features"] == "supcon-ce"
    assert first["own classifier"]["mean"] == rows[-1]["classifier"]
    assert [row["own classifier"] for row in others] == ["-", "-"]
    assert "classifier" not in metrics(run(few, tmp_path / "out", "--max-steps", 1))[0]


def save_scores(path, *argv):
    """Run supcon.py, and save what its classifier gave in the evaluation."""
    real = common.extract_features

    def noting(network, images, size):
        scores = real(network, images, size)
        if scores.shape[1] == 3:
            torch.save(scores, path)
        return scores

    common.extract_features = noting
    supcon.main([*argv])


def test_bfloat16_leaves_the_evaluation_of_the_classifier_in_float32(few, tmp_path):
    argv = arguments("supcon", few, tmp_path / "run", "--loss ce --max-steps 1")
    run = start(
        "test_supcon.save_scores",
        tmp_path / "scores",
        *argv,
        output=tmp_path / "text",
        environment={"ACCELERATE_MIXED_PRECISION": "bf16"},
    )
    code, text = run.wait()
    assert code == 0, text
    scores = torch.load(tmp_path / "scores", weights_only=True)
    assert not torch.equal(scores, scores.bfloat16().float())
