"""The estimator of what the transformer reads: its mean is the second order of the vision loss, exactly."""

import pytest
import torch

from models.backbone import FluxBackbone
from models.geometry import Geometry
from models.memory_options import MemoryOptions
from models.text_products import text_products
from tests.random_teacher import make_teacher

STEPS, TEXT, SIGMA = 3, 4, (0.9, 0.6, 0.3)


class World:
    """One trajectory of a tiny transformer in float64: its predictions as functions of the embedding, and exact J."""

    def __init__(self, folder) -> None:
        geometry = Geometry(height=32, width=32, rows=2, columns=2, channels=16)
        self.backbone = FluxBackbone.load(
            folder, geometry, text_length=TEXT, dtype=torch.float64, device=torch.device("cpu")
        )
        generator = torch.Generator().manual_seed(0)
        config = self.backbone.transformer.config
        self.latents_KSC = torch.randn(STEPS, 4, config.in_channels, generator=generator, dtype=torch.float64)
        self.embedding_TD = torch.randn(TEXT, config.joint_attention_dim, generator=generator, dtype=torch.float64)
        self.jacobians = [
            torch.autograd.functional.jacobian(lambda e, k=k: self.predict(k, e[None])[0], self.embedding_TD)
            for k in range(STEPS)
        ]
        self.size = self.latents_KSC[0].numel()

    def predict(self, k, embedding_BTD):
        rows = len(embedding_BTD)
        return self.backbone.predict(
            self.latents_KSC[k].expand(rows, -1, -1),
            embedding_BTD,
            self.backbone.zero_pooled(rows),
            torch.full((rows,), SIGMA[k], dtype=torch.float64),
            torch.full((rows,), 3.5),
        )

    def vision_loss(self, moved_TD):
        """Mean over the steps of the mean squared difference."""
        with torch.no_grad():
            losses = [
                (self.predict(k, (self.embedding_TD + moved_TD)[None]) - self.predict(k, self.embedding_TD[None]))
                .square()
                .mean()
                for k in range(STEPS)
            ]
        return float(sum(losses) / STEPS)

    @property
    def second_order(self):
        """H of [T D, T D]: the mean over steps of J^T J / (S C)."""
        flat = [jacobian.reshape(self.size, -1) for jacobian in self.jacobians]
        return sum(one.T @ one for one in flat) / (STEPS * self.size)

    def products(self, count, seed=0):
        """So many s, [N, T, D]."""
        generator = torch.Generator().manual_seed(seed)
        found = torch.zeros(count, *self.embedding_TD.shape, dtype=torch.float64)
        embeddings = self.embedding_TD.expand(count, -1, -1)
        for k in range(STEPS):
            normal = torch.randn(count, *self.latents_KSC[0].shape, generator=generator, dtype=torch.float64)
            (of_step,) = text_products(lambda text, k=k: self.predict(k, text), embeddings, [normal])
            found += of_step / (STEPS * self.size) ** 0.5
        return found


@pytest.fixture(scope="module")
def products(world):
    return world.products(2048)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(make_teacher(tmp_path_factory.mktemp("tiny") / "teacher", seed=3))


def test_the_vision_loss_of_a_small_step_is_its_quadratic_form(world):
    direction = torch.randn(world.embedding_TD.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    form = float(direction.flatten() @ world.second_order @ direction.flatten())
    off = [abs(world.vision_loss(size * direction) / (size**2 * form) - 1) for size in (1e-2, 1e-3, 1e-4)]
    assert off[2] < 1e-3
    # What is left is of the next order: ten times smaller for a step ten times smaller.
    assert off[1] < 0.2 * off[0] and off[2] < 0.2 * off[1]


def test_a_product_is_the_jacobian_transposed_times_the_vector(world):
    normals = [torch.randn(1, *world.latents_KSC[0].shape, dtype=torch.float64) for _ in range(3)]
    found = text_products(lambda text: world.predict(1, text), world.embedding_TD[None], normals)
    for product, normal in zip(found, normals, strict=True):
        wanted = torch.einsum("sctd,sc->td", world.jacobians[1], normal[0])
        assert torch.allclose(product[0], wanted, rtol=0, atol=1e-6)


def test_the_mean_square_along_a_direction_converges_as_one_over_the_root_of_the_products(world, products):
    direction = torch.randn(world.embedding_TD.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    form = float(direction.flatten() @ world.second_order @ direction.flatten())
    along = (products * direction).sum((1, 2)).square()
    # s . d is normal: its square has twice the squared variance.
    for count in (32, 128, 512, 2048):
        means = along.reshape(-1, count).mean(1)
        spread = float((means / form - 1).square().mean().sqrt())
        assert spread < 2.2 * (2 / count) ** 0.5, count
    assert abs(float(along.mean()) / form - 1) < 4 * (2 / 2048) ** 0.5


def test_the_metric_converges_to_the_mean_block_of_a_token(world, products):
    width = world.embedding_TD.shape[1]
    blocks = world.second_order.reshape(TEXT, width, TEXT, width)
    wanted = sum(blocks[t, :, t] for t in range(TEXT)) / TEXT

    def off(count):
        rows = products[:count].reshape(-1, width)
        return float((rows.T @ rows / len(rows) - wanted).norm() / wanted.norm())

    assert off(2048) < 0.15
    assert off(2048) < off(32) / 3


@pytest.mark.parametrize("options", [{"checkpoint_blocks": 1}, {"modulation": "live"}, {"resident_blocks": 0}])
def test_several_products_of_one_forward_are_the_same_with_every_memory_option(tmp_path, options):
    folder = make_teacher(tmp_path / "teacher", seed=4)
    geometry = Geometry(height=32, width=32, rows=2, columns=2, channels=16)

    def products(**flags):
        backbone = FluxBackbone.load(
            folder, geometry, text_length=TEXT, dtype=torch.float32, device=torch.device("cpu"),
            options=MemoryOptions(**flags),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        config = backbone.transformer.config
        latent = torch.randn(2, 4, config.in_channels, generator=generator)
        text = torch.randn(2, TEXT, config.joint_attention_dim, generator=generator)
        normals = [torch.randn(2, 4, config.in_channels, generator=generator) for _ in range(2)]
        times, guidance = torch.tensor([0.9, 0.4]), torch.tensor([3.5, 2.0])
        return text_products(
            lambda e: backbone.predict(latent, e, backbone.zero_pooled(2), times, guidance), text, normals
        )

    for plain, other in zip(products(), products(**options), strict=True):
        assert torch.equal(plain, other)
