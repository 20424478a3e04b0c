"""`head` then `tail` is the model to the last bit; what is no single-tensor cut is refused with a way out."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.core.cut import OWN, Split, cuts, split
from sfumato.core.digest import digest_of
from sfumato.core.errors import CutError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


# --- real architectures, small -------------------------------------------------------------------------------------


class Crelu(nn.Module):
    def __init__(self, c: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, out, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Any:
        x = self.bn(self.conv(x))
        return F.relu(torch.cat([x, -x], 1), inplace=True)


class Inception(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(c, c // 2, 1)
        self.three = nn.Conv2d(c, c // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return torch.cat([self.one(x), self.three(F.max_pool2d(x, 3, 1, 1))], 1)


class Detector(nn.Module):
    """FaceBoxes in small: CReLU, pools, inception, two detection layers; returns (loc, conf)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.pool1 = Crelu(3, 4, 2), nn.MaxPool2d(3, 2, 1)
        self.conv2, self.pool2 = Crelu(8, 8, 1), nn.MaxPool2d(3, 2, 1)
        self.inception1, self.inception3 = Inception(16), Inception(16)
        self.down = nn.Conv2d(16, 16, 3, 2, 1)
        self.loc = nn.ModuleList(nn.Conv2d(16, 4, 3, padding=1) for _ in range(2))
        self.conf = nn.ModuleList(nn.Conv2d(16, 2, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool2(self.conv2(self.pool1(self.conv1(x))))
        near = self.inception3(self.inception1(x))
        maps = (near, self.down(near))
        loc = [f(m).permute(0, 2, 3, 1).flatten(1) for f, m in zip(self.loc, maps, strict=True)]
        conf = [f(m).permute(0, 2, 3, 1).contiguous().view(m.size(0), -1) for f, m in zip(self.conf, maps, strict=True)]
        return torch.cat(loc, 1).view(x.size(0), -1, 4), torch.cat(conf, 1).view(x.size(0), -1, 2)


class Block(nn.Module):
    def __init__(self, c: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Conv2d(c, out, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Any:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += identity
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Block(8, 8, 1), Block(8, 8, 1))
        self.layer2 = nn.Sequential(Block(8, 16, 2), Block(16, 16, 1))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def encoder(**kwargs: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 3, **kwargs)


ASSERTING: dict[str, Any] = {}
exec(
    "def short(t):\n    assert t <= 32, 'too long'", ASSERTING
)  # pytest rewrites the assert statements of its own files


class Gpt(nn.Module):
    """Sizes, a device, a causal mask and positions made from the input's shape; an assertion; an optional argument."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 16), nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True) for _ in range(3))
        self.out = nn.Linear(16, 11)
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        n, t = ids.shape
        ASSERTING["short"](t)
        mask = torch.full((t, t), -math.inf, device=ids.device).triu(1)
        x = self.tokens(ids) + self.positions(torch.arange(t, device=ids.device)) * math.sqrt(t) * self.scale
        for block in self.blocks:
            x = block(x, src_mask=mask)
        y = self.out(x).view(n, t, -1)
        return y if targets is None else (y, F.cross_entropy(y.flatten(0, 1), targets.flatten()))


REAL: list[tuple[Callable[[], nn.Module], str, Callable[..., Tensor]]] = [
    (Detector, "pool2", lambda n=2, a=5, b=3: torch.rand(n, 3, 8 * a, 8 * b)),
    (Detector, "conv1.conv", lambda n=2, a=5, b=3: torch.rand(n, 3, 8 * a, 8 * b)),
    (ResNet, "layer1.0", lambda n=2, a=5, b=3: torch.rand(n, 3, 8 * a, 8 * b)),
    (ResNet, "conv1", lambda n=2, a=5, b=3: torch.rand(n, 3, 8 * a, 8 * b)),
    (encoder, "layers.0", lambda n=2, a=5, b=3: torch.rand(n, a, 16)),
    (Gpt, "blocks.1", lambda n=2, a=5, b=3: torch.randint(11, (n, a))),
]
DISTINCT = [REAL[0], REAL[2], REAL[4], REAL[5]]
IDS = ["detector", "detector-inside", "resnet", "resnet-inplace", "transformer", "gpt"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(7)


def made(factory: Callable[[], nn.Module]) -> nn.Module:
    """A model in eval mode whose batch-norm statistics are not the initial ones."""
    torch.manual_seed(7)
    model = factory().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif hasattr(value, "__dataclass_fields__"):
        yield from tensors(list(vars(value).values()))
    else:
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def assert_exact(s: Split, *inputs: Tensor) -> None:
    """Bit for bit, in no_grad (fused kernels) and with gradients (the plain ones)."""
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            want = s.model(*(x.clone() for x in inputs))
            got = s.tail(s.head(*(x.clone() for x in inputs)))
        assert type(want) is type(got)
        pairs = list(zip(tensors(want), tensors(got), strict=True))
        assert pairs
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def refused(model: nn.Module, at: str | None, example: Any = None) -> CutError:
    with pytest.raises(CutError) as caught:
        split(model, at=at, example=example)
    return caught.value


# --- equality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("factory", "at", "x"), REAL, ids=IDS)
def test_the_sides_repeat_the_model_for_any_batch_and_size(
    factory: Callable[[], nn.Module], at: str, x: Callable[..., Tensor], device: str
) -> None:
    model = made(factory).to(device)
    s = split(model, at=at, example=x().to(device))
    assert s.plan is not None
    assert s.plan.route == "fx"
    for n, a, b in ((1, 4, 4), (3, 9, 2), (5, 7, 11)):
        assert_exact(s, x(n, a, b).to(device))


def test_an_assertion_of_the_forward_still_holds() -> None:
    with pytest.raises(AssertionError):
        split(made(Gpt), at="blocks.1").head(torch.randint(11, (1, 33)))


@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 4), h=st.integers(8, 70), w=st.integers(8, 70))
def test_a_detector_cut_once_takes_what_the_model_takes(n: int, h: int, w: int) -> None:
    s = split(made(Detector), at="pool2")
    assert_exact(s, torch.rand(n, 3, h, w))


def test_faceboxes_at_its_second_pool() -> None:
    faceboxes = pytest.importorskip("sfumato.tasks.detection.faceboxes")
    model, x = made(faceboxes.FaceBoxes), torch.rand(1, 3, 256, 256)
    named, own = split(model, at="pool2", example=x), split(model, example=x)
    assert (named.at, own.at) == ("pool2", OWN)
    for s in (named, own):
        assert s.head(x).shape == (1, 128, 8, 8)
        loc, conf = s.tail(s.head(x))
        assert loc.shape[:2] == conf.shape[:2] == (1, 1364)
        assert_exact(s, torch.rand(2, 3, 96, 160))


@dataclass
class Answer:
    logits: Tensor
    extra: dict[str, Tensor]


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Answer:
        y = self.b(self.a(x))
        return Answer(y, {"probability": y.softmax(1)})


def test_a_dataclass_comes_back_as_one() -> None:
    s = split(made(Structured), at="a", example=torch.rand(2, 4))
    assert isinstance(s.tail(s.head(torch.rand(3, 4))), Answer)
    assert_exact(s, torch.rand(3, 4))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.join, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor, weight: float = 1.0) -> Any:
        return self.out(self.join(self.image(x) + weight * self.text(y)))


def test_the_head_takes_several_inputs() -> None:
    model = made(TwoInputs)
    s = split(model, at="join", example=(torch.rand(2, 4), torch.rand(2, 4)))
    assert_exact(s, torch.rand(3, 4), torch.rand(3, 4))
    assert_exact(split(model, at="join"), torch.rand(3, 4), torch.rand(3, 4))
    assert "the input 'y'" in refused(model, "image").got


class Residue(nn.Module):
    """Results thrown away after a write in place, a slice of a container, a buffer, a constant, tied weights."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        self.relu = nn.ReLU(inplace=True)
        self.out = nn.Linear(4, 4)
        self.out.weight = cast(nn.Linear, self.body[0]).weight
        self.register_buffer("shift", torch.rand(4), persistent=False)

    def forward(self, x: Tensor) -> Any:
        y = self.body[:2](x)
        self.relu(y)
        y.add_(self.shift)
        y += self.shift
        y = self.body[2](y)
        self.relu(y)
        return self.out(y * torch.tensor([1.0, 2.0, 3.0, 4.0]) + self.shift[:1])


@pytest.mark.parametrize("at", ["body.0", "body.1", "body.2"])
def test_writes_in_place_stay_on_their_side_and_in_order(at: str) -> None:
    s = split(made(Residue), at=at, example=torch.rand(2, 4))
    assert_exact(s, torch.rand(3, 4))
    z = s.head(torch.rand(3, 4)).detach()
    before = z.clone()
    s.tail(z)
    assert torch.equal(z, before)


class Sizes(nn.Module):
    """The tail needs sizes that the head saw: the batch always, the input's height and width where asked."""

    def __init__(self, *, picture: bool) -> None:
        super().__init__()
        self.conv, self.pool, self.last = nn.Conv2d(3, 4, 3, 1, 1), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1)
        self.picture = picture

    def forward(self, x: Tensor) -> Any:
        n, size, half = x.size(0), x.shape[-2:], x.shape[0] // 2 + x.dim()
        y = self.last(self.pool(self.conv(x)))
        y = F.interpolate(y, size=size) if self.picture else y
        return y.reshape(n, -1) * half


def test_sizes_are_read_off_the_crossing_tensor_where_they_agree() -> None:
    for example in (None, torch.rand(2, 3, 8, 8)):
        assert_exact(split(made(lambda: Sizes(picture=False)), at="pool", example=example), torch.rand(5, 3, 6, 10))
        assert_exact(split(made(lambda: Sizes(picture=True)), at="conv", example=example), torch.rand(5, 3, 6, 10))


class Made(nn.Module):
    """A value that both sides read, made from a size: drawn at random, or written after it was made."""

    def __init__(self, *, drawn: bool) -> None:
        super().__init__()
        self.a, self.b, self.drawn = nn.Linear(4, 4), nn.Linear(4, 4), drawn

    def forward(self, x: Tensor) -> Any:
        extra = torch.rand(x.size(0), 4) if self.drawn else torch.zeros(x.size(0), 4)
        if not self.drawn:
            extra.fill_(2)
        return self.b(self.a(x + extra) * extra)


@pytest.mark.parametrize("drawn", [True, False])
def test_what_was_drawn_or_overwritten_is_not_made_again(drawn: bool) -> None:
    model = made(lambda: Made(drawn=drawn))
    assert f"the value '{'rand' if drawn else 'zeros'}'" in refused(model, "a").got
    split(model, at="b", example=torch.rand(2, 4))


def test_a_size_the_crossing_tensor_lacks_is_an_error_not_a_guess() -> None:
    model, x = made(lambda: Sizes(picture=True)), torch.rand(2, 3, 8, 8)
    error = refused(model, "pool", x)
    assert "which the tail needs" in error.got
    assert error.do == "split(model, at='conv')"
    assert [plan.at for plan in cuts(model, x)] == ["conv"]
    with pytest.raises(CutError, match="which the tail needs"):
        split(model, at="pool").head(x)


# --- control flow --------------------------------------------------------------------------------------------------


class Gate(nn.Module):
    """Branches on its data, which no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.up(x) if float(x.detach().sum()) > 0 else self.down(x)


def test_control_flow_beside_the_cut_does_not_matter() -> None:
    model = made(lambda: nn.Sequential(Gate(), nn.Linear(4, 4), Gate()))
    s = split(model, at="1", example=torch.rand(2, 4))
    for sign in (1, -1):
        assert_exact(s, sign * torch.rand(3, 4))


def test_control_flow_on_data_around_the_cut_is_refused() -> None:
    error = refused(made(lambda: nn.Sequential(Gate(), nn.Linear(4, 4))), "0.up", torch.ones(2, 4))
    assert "neither torch.fx" in error.got
    assert error.do == "split(model, at='0')"
    assert "torch.fx cannot follow Gate" in refused(made(Gate), "up").got
    assert "example" in refused(made(Gate), "up").do


class Tiles(nn.Module):
    """Branches on a size, loops over one, and writes into a slice: beyond torch.fx, not beyond torch.export."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.last = nn.Conv2d(4, 2, 1)
        self.register_buffer("tint", torch.rand(4, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.stem(x[..., :16] if x.shape[-1] > 16 else x)
        for c in range(y.shape[1]):
            y[:, c] = y[:, c] * (c + 1)
        return {"map": self.last(y * self.tint).view(x.shape[0], 2, -1)}


def test_torch_export_takes_over_where_torch_fx_gives_up() -> None:
    model, at = made(Tiles), "stem.1"
    s = split(model, at=at, example=torch.rand(1, 3, 8, 8))
    assert s.plan is not None
    assert s.plan.route == "export"
    assert s.plan.shape == (1, 4, 8, 8)
    for shape in ((1, 3, 8, 8), (5, 3, 8, 8), (2, 3, 12, 10)):
        assert_exact(s, torch.rand(shape))
    with pytest.raises(AssertionError, match="Guard failed"):
        s.head(torch.rand(1, 3, 8, 20))
    assert_names(s)
    assert_exact(Split(model, copy.deepcopy(s.head), copy.deepcopy(s.tail), at, None), torch.rand(2, 3, 8, 8))
    assert {plan.at for plan in cuts(model, torch.rand(2, 3, 8, 8))} == {"stem", "stem.0", "stem.1", "stem.2"}


class Moody(nn.Module):
    """Drops units and branches by its own mode."""

    def __init__(self, *, branches: bool) -> None:
        super().__init__()
        self.a, self.b, self.branches = nn.Linear(4, 4), nn.Linear(4, 4), branches

    def forward(self, x: Tensor) -> Any:
        y = F.dropout(self.a(x), 0.5, self.training)
        if self.branches and self.training:
            return y
        return self.b(y)


def test_training_mode_stays_live_and_a_branch_on_it_is_guarded() -> None:
    s = split(made(lambda: Moody(branches=False)).train(), at="a", example=torch.rand(2, 4))
    x = torch.rand(3, 4)
    torch.manual_seed(3)
    want = s.model(x)
    torch.manual_seed(3)
    assert torch.equal(want, s.tail(s.head(x)))
    assert not torch.equal(want, s.tail.eval()(s.head(x)))
    branching = split(made(lambda: Moody(branches=True)), at="a", example=x)
    assert_exact(branching, x)
    with pytest.raises(CutError, match="training mode"):
        branching.tail.train()(branching.head(x))


class Replaced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x))


def test_what_a_trace_would_miss_is_found_by_running_both() -> None:
    x = torch.rand(2, 4)
    hooked = made(Replaced)
    hooked.register_forward_hook(lambda _m, _a, out: out + 1)
    assert "do not repeat the model" in refused(hooked, "a", x).got
    patched = made(Replaced)
    patched.forward = lambda x: 2 * patched.get_submodule("b")(patched.get_submodule("a")(x))
    s = split(patched, at="a", example=x)
    assert s.plan is not None
    assert s.plan.route == "export"
    assert_exact(s, x)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        with torch.autocast("cpu", torch.bfloat16):
            return self.b(y)


def test_autocast_inside_a_forward_is_not_lost() -> None:
    assert "autocast" in refused(made(Mixed), "a").got


# --- refusals ------------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.out = nn.Linear(4, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        y, (h, _) = self.lstm(self.embed(x))
        return self.out(y + h[-1][:, None])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act, self.mid, self.out = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.act(self.mid(self.act(self.layer(self.layer(x))))))


@pytest.mark.parametrize(
    ("factory", "at", "shape", "why"),
    [
        (Detector, "pool3", (1, 3, 32, 32), "did you mean 'pool2'?"),
        (Detector, "", (1, 3, 32, 32), "has no submodule ''"),
        (Detector, "loc", (1, 3, 32, 32), "never called"),
        (Detector, "inception1.one", (1, 3, 32, 32), "skip connection"),
        (ResNet, "layer1.0.conv1", (1, 3, 32, 32), "skip connection"),
        (ResNet, "layer2.0.downsample", (1, 3, 32, 32), "skip connection"),
        (Reader, "lstm", (2, 5, 4), "returns a tuple"),
        (Reader, "unused", (2, 5, 4), "never called"),
        (Twice, "act", (2, 4), "called 2 times"),
        (Twice, "layer", (2, 4), "called 2 times"),
        (encoder, "layers.0.linear1", (2, 5, 16), "in one piece"),
    ],
)
def test_every_refusal_says_why_and_offers_a_cut_that_works(
    factory: Callable[[], nn.Module], at: str, shape: tuple[int, ...], why: str
) -> None:
    model, x = made(factory), torch.rand(shape)
    errors = [refused(model, at, x)] + ([refused(model, at)] if factory is not encoder else [])
    for error in errors:
        assert why in error.got
        offered = error.do.removeprefix("split(model, at='").removesuffix("')")
        assert offered in error.wanted
        assert_exact(split(model, at=offered, example=x), x)


def test_models_with_an_lstm_or_a_reused_layer_are_cut_elsewhere() -> None:
    assert_exact(split(made(Reader), at="embed", example=torch.rand(1, 3, 4)), torch.rand(3, 5, 4))
    s = split(made(Twice), at="mid", example=torch.rand(1, 4))
    assert_exact(s, torch.rand(3, 4))
    assert s.plan is not None
    assert (s.plan.head_macs, s.plan.tail_macs) == (3 * 16, 8)


@pytest.mark.parametrize("example", [[torch.rand(2, 4)], "x", (), (torch.rand(2, 4), 3)])
def test_an_example_that_is_no_tensor_is_refused(example: Any) -> None:
    assert "tuple of tensors" in refused(made(Replaced), "a", example).wanted


def test_an_example_the_model_refuses_is_named_by_shape() -> None:
    error = refused(made(Replaced), "a", torch.rand(2, 5))
    assert "[2, 5] torch.float32" in error.got
    assert "example" in error.wanted


def test_a_tuple_out_of_an_unknown_module_is_caught_when_it_runs() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.out = Pair(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.out(self.pair(x)[0])

    with pytest.raises(CutError, match="returns a tuple"):
        split(made(Takes), at="pair").head(torch.rand(2, 4))


# --- the sides as modules ------------------------------------------------------------------------------------------


def assert_names(s: Split) -> None:
    """Both sides speak the model's names, and hold the very tensors of the model."""
    state, names = s.model.state_dict(), [*s.head.state_dict(), *s.tail.state_dict()]
    assert names
    for side in (s.head, s.tail):
        assert all(state[name].data_ptr() == value.data_ptr() for name, value in side.state_dict().items())


@pytest.mark.parametrize(("factory", "at", "x"), REAL, ids=IDS)
def test_names_weights_and_copies(factory: Callable[[], nn.Module], at: str, x: Callable[..., Tensor]) -> None:
    s = split(made(factory), at=at, example=x())
    assert_names(s)
    assert {*s.head.state_dict(), *s.tail.state_dict()} == set(s.model.state_dict())
    head, tail = copy.deepcopy(s.head), copy.deepcopy(s.tail)
    assert [list(side.state_dict()) for side in (head, tail)] == [list(side.state_dict()) for side in (s.head, s.tail)]
    assert_exact(Split(s.model, head, tail, at, None), x(3))
    tail.load_state_dict({k: torch.zeros_like(v) for k, v in tail.state_dict().items()})
    assert not any(m.training for side in (head, tail) for m in side.modules())
    assert_exact(s, x(3))


def test_hooks_on_a_submodule_of_the_tail_fire() -> None:
    s = split(made(Detector), at="pool2")
    for tail in (s.tail, copy.deepcopy(s.tail)):
        seen: list[Tensor] = []
        handle = tail.get_submodule("inception3").register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out))
        tail(s.head(torch.rand(1, 3, 32, 32)))
        handle.remove()
        assert [x.shape for x in seen] == [(1, 16, 4, 4)]


def test_the_checks_of_a_side_survive_another_trace() -> None:
    s, ids = split(made(Gpt), at="blocks.1"), torch.randint(11, (2, 5))
    again = torch.fx.symbolic_trace(s.head)
    assert torch.equal(again(ids), s.head(ids))
    with pytest.raises(AssertionError):
        again(torch.randint(11, (2, 33)))


def test_the_weights_are_shared() -> None:
    s = split(made(ResNet), at="layer1", example=torch.rand(1, 3, 32, 32))
    with torch.no_grad():
        s.model.get_parameter("fc.weight").mul_(2)
        s.model.get_parameter("conv1.weight").mul_(3)
    assert_exact(s, torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize("factory", [Detector, Gpt, Tiles, Residue, Moody])
def test_the_model_is_left_as_it_was(factory: Callable[..., nn.Module]) -> None:
    model = made(lambda: factory(branches=True) if factory is Moody else factory()).train()
    next(model.children()).eval()
    shapes: dict[Any, tuple[int, ...]] = {Detector: (1, 3, 32, 32), Tiles: (2, 3, 8, 8)}
    x = torch.randint(11, (2, 5)) if factory is Gpt else torch.rand(shapes.get(factory, (2, 4)))
    before = looks(model)
    works = cuts(model, x)
    assert works
    if factory is not Tiles:
        split(model, at=works[0].at, example=x)
        refused(model, "nothing of that name", x)
    assert looks(model) == before


def looks(model: nn.Module) -> Any:
    """Everything an observer could notice, random state included."""
    parts = [
        (name, type(m), m.training, sorted(vars(m)), [(k, len(v)) for k, v in vars(m).items() if k.endswith("hooks")])
        for name, m in model.named_modules()
    ]
    hooks = [len(v) for k, v in vars(nn.modules.module).items() if k.startswith("_global") and isinstance(v, dict)]
    state = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    fast = torch.backends.mha.get_fastpath_enabled()
    return parts, hooks, digest_of(state), torch.get_rng_state().tolist(), fast, torch.is_grad_enabled()


# --- the model's own head and tail ---------------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward_head(self, x: Tensor) -> Any:
        return self.a(x).tanh()

    def forward_tail(self, z: Tensor) -> Any:
        return self.b(z)

    def forward(self, x: Tensor) -> Any:
        return self.forward_tail(self.forward_head(x))


class OwnBranching(Own):
    def forward_tail(self, z: Tensor) -> Any:
        return self.b(z) if float(z.detach().sum()) > 0 else -self.b(z)


@pytest.mark.parametrize("factory", [Own, OwnBranching])
@pytest.mark.parametrize("at", [None, OWN])
def test_a_model_with_its_own_head_and_tail_is_cut_there(factory: type[Own], at: str | None) -> None:
    model = made(factory)
    s = split(model, at=at, example=torch.rand(2, 4))
    assert (s.at, s.plan and s.plan.route, s.plan and s.plan.shape) == (OWN, "own", (2, 6))
    for sign in (1, -1):
        assert_exact(s, sign * torch.rand(3, 4))
        assert_exact(Split(model, copy.deepcopy(s.head), copy.deepcopy(s.tail), OWN, None), sign * torch.rand(3, 4))
    assert_names(s)
    assert list(s.head.state_dict()) == ["a.weight", "a.bias"]
    assert ("a.weight" in s.tail.state_dict()) == (factory is OwnBranching)
    assert_exact(split(model, at="a", example=None) if factory is Own else s, torch.rand(2, 4))


class OwnOther(Own):
    def forward(self, x: Tensor) -> Any:
        return self.forward_tail(self.forward_head(x)) + 1


def test_an_own_head_and_tail_that_are_not_the_model_are_refused() -> None:
    assert "do not repeat the model" in refused(made(OwnOther), None, torch.rand(2, 4)).got


# --- plans ---------------------------------------------------------------------------------------------------------


def test_a_plan_counts_by_hand() -> None:
    model = made(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 5)))
    plan = split(model, at="1", example=torch.rand(2, 3, 8, 8)).plan
    assert plan is not None
    assert (plan.shape, plan.nbytes) == ((2, 8, 4, 4), 8 * 4 * 4 * 4)
    assert (plan.head_parameters, plan.tail_parameters) == (3 * 8 * 9 + 8, 128 * 5 + 5)
    assert (plan.head_macs, plan.tail_macs) == (2 * 64 * 3 * 8 * 9, 2 * 128 * 5)
    text = str(plan)
    for part in (
        "cut after 1 (fx)",
        "[2, 8, 4, 4], 512 bytes",
        "224 parameters",
        "27,648 multiply-adds",
        "645",
        "1,280",
    ):
        assert part in text


def test_fused_attention_and_recurrence_are_counted() -> None:
    plan = split(made(encoder), at="layers.0", example=torch.rand(2, 10, 16)).plan
    assert plan is not None
    layer = 2 * 10 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 2 * 10 * 10 * 16
    assert (plan.head_macs, plan.tail_macs) == (layer, 2 * layer)
    plan = split(made(Reader), at="embed", example=torch.rand(2, 5, 4)).plan
    assert plan is not None
    assert plan.tail_macs == 2 * 5 * (8 + 8) * 32 + 2 * 5 * 8 * 2


@pytest.mark.parametrize(("factory", "at", "x"), DISTINCT, ids=["detector", "resnet", "transformer", "gpt"])
def test_every_cut_listed_works_and_is_planned_the_same(
    factory: Callable[[], nn.Module], at: str, x: Callable[..., Tensor]
) -> None:
    model = made(factory)
    plans = cuts(model, x())
    assert at in [plan.at for plan in plans]
    for plan in plans:
        s = split(model, at=plan.at, example=x())
        assert s.plan == plan
        assert_exact(s, x(3))


def test_what_is_not_listed_is_refused_or_leaves_no_work() -> None:
    model, x = made(ResNet), torch.rand(1, 3, 32, 32)
    listed = {plan.at for plan in cuts(model, x)}
    assert listed == {
        "conv1", "bn1", "relu", "maxpool", "layer1", "layer1.0", "layer1.1", "layer2", "layer2.0", "layer2.1", "avgpool"
    }  # fmt: skip
    for name in {name for name, _ in model.named_modules() if name.startswith("layer2.0.")}:
        refused(model, name)
    assert_exact(split(model, at="fc", example=x), x)


def test_without_a_name_the_smallest_tensor_of_the_first_half_is_taken() -> None:
    model, x = made(ResNet), torch.rand(2, 3, 32, 32)
    s, plans = split(model, example=x), cuts(model, x)
    assert s.plan is not None
    assert s.plan.head_macs <= s.plan.tail_macs
    assert s.plan.nbytes == min(plan.nbytes for plan in plans if plan.head_macs <= plan.tail_macs)
    assert s.at == "layer1.0"
    assert_exact(s, x)
    assert "example" in refused(model, None).do


def test_a_model_in_one_piece_has_no_cut() -> None:
    assert "no valid cut" in refused(made(lambda: nn.Linear(4, 4)), None, torch.rand(2, 4)).wanted


# --- digests -------------------------------------------------------------------------------------------------------


def test_a_digest_tells_models_apart_and_nothing_else() -> None:
    model = made(ResNet)
    before = split(model, at="layer1").digest()
    assert before == split(model, at="layer2").digest() == split(made(ResNet), at="layer1").digest()
    with torch.no_grad():
        model.get_parameter("fc.bias")[3] += 1e-3
    assert split(model, at="layer1").digest() != before


def test_a_digest_reads_names_types_shapes_and_bytes() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    others = [
        {"y": x},
        {"x": x.reshape(3, 2)},
        {"x": x.double()},
        {"x": x.bfloat16()},
        {"x": x.half()},
        {"x": x.int()},
        {"x": -x},
        {"x": x, "y": x},
        {},
    ]
    digests = {digest_of(tensors) for tensors in [{"x": x}, *others]}
    assert len(digests) == len(others) + 1
    assert all(len(digest) == 64 for digest in digests)
    assert digest_of({"x": x.T.contiguous().T, "a": x[:0]}) == digest_of({"a": x[:0].clone(), "x": x})
    assert digest_of({"s": torch.tensor(True)}) != digest_of({"s": torch.tensor(False)})
