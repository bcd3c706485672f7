"""What stands in for CUDA in SGLang's CPU engine: copies of stock HiCache, drafts, linear attention, imports."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts" / "sglang_cpu"))

from sglang_cpu import copies, linear_attention, speculative

SCRIPTS = REPOSITORY / "scripts"
LAYERS, PAGE, PAGES, HEADS, DIM = 3, 4, 8, 2, 8
ROW = HEADS * DIM * 2
SIZE = PAGES * PAGE


def tokens(*pages: int) -> torch.Tensor:
    """Token indices of whole pages."""
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def random_layers(seed: int) -> list[torch.Tensor]:
    """K or V of each layer of a device pool."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SIZE, HEADS, DIM, generator=generator).bfloat16() for _ in range(LAYERS)]


def addresses(layers: list[torch.Tensor]) -> torch.Tensor:
    """The table of layers that SGLang gives backups."""
    return torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.uint64)


HOST_SHAPES = {
    "layer_first": (LAYERS, SIZE, HEADS, DIM),
    "page_first": (SIZE, LAYERS, HEADS, DIM),
    "direct": (LAYERS, SIZE, HEADS, DIM),
    "page_first_direct": (PAGES, LAYERS, PAGE, HEADS, DIM),
}


def page_of(host: torch.Tensor, layout: str, page: int, layer: int) -> torch.Tensor:
    """One layer of a page of a host pool, by what the layout means."""
    if layout == "page_first":
        return host[tokens(page), layer]
    return host[page, layer] if layout == "page_first_direct" else host[layer, tokens(page)]


def back_up(k: list[torch.Tensor], v: list[torch.Tensor], host: list[torch.Tensor], layout: str) -> None:
    """Pages 2 and 5 of the device to pages 6 and 1 of the host, as SGLang calls it."""
    src, dst = tokens(2, 5), tokens(6, 1)
    if layout == "layer_first":
        tables = (addresses(k), addresses(list(host[0])), addresses(v), addresses(list(host[1])))
        copies.transfer_kv_all_layer(*tables, src, dst, ROW, LAYERS)
    elif layout == "page_first":
        pools = (addresses(k), host[0], addresses(v), host[1])
        copies.transfer_kv_all_layer_lf_pf(*pools, src, dst, ROW, LAYERS * ROW, LAYERS)
    elif layout == "direct":
        copies.transfer_kv_direct([*k, *v], [*host[0], *host[1]], src, dst, PAGE)
    else:
        copies.transfer_kv_all_layer_direct_lf_pf([*k, *v], host, src, dst, PAGE)


def load(host: list[torch.Tensor], k: list[torch.Tensor], v: list[torch.Tensor], layout: str, layer: int) -> None:
    """One layer of these pages to pages 7 and 4 of the device."""
    src, dst = tokens(6, 1), tokens(7, 4)
    to = k[layer], v[layer]
    if layout == "layer_first":
        copies.transfer_kv_per_layer(host[0][layer], to[0], host[1][layer], to[1], src, dst, ROW)
    elif layout == "page_first":
        copies.transfer_kv_per_layer_pf_lf(host[0], to[0], host[1], to[1], src, dst, layer, ROW, LAYERS * ROW)
    elif layout == "direct":
        copies.transfer_kv_direct([host[0][layer], host[1][layer]], list(to), src, dst, PAGE)
    else:
        copies.transfer_kv_per_layer_direct_pf_lf(host, list(to), src, dst, layer, PAGE)


@pytest.mark.parametrize("layout", HOST_SHAPES)
def test_copies_of_stock_hicache(layout: str) -> None:
    k, v = random_layers(0), random_layers(1)
    stored = [[layer.clone() for layer in part] for part in (k, v)]
    host = [torch.zeros(HOST_SHAPES[layout], dtype=torch.bfloat16) for _ in range(2)]
    back_up(k, v, host, layout)
    for part, held in zip(host, stored, strict=True):
        for layer in range(LAYERS):
            for page in range(PAGES):
                wanted = {6: held[layer][tokens(2)], 1: held[layer][tokens(5)]}.get(page)
                kept = page_of(part, layout, page, layer)
                assert torch.equal(kept, torch.zeros_like(kept) if wanted is None else wanted)
    for layer in range(LAYERS):
        load(host, k, v, layout, layer)
        # Later layers are not touched yet.
        for other in range(layer + 1, LAYERS):
            assert torch.equal(k[other], stored[0][other])
    for found, held in zip((k, v), stored, strict=True):
        for layer in range(LAYERS):
            held[layer][tokens(7, 4)] = held[layer][tokens(2, 5)]
            assert torch.equal(found[layer], held[layer])


def test_copies_of_one_array_a_layer() -> None:
    """MLA in layer_first, and states, which are page_first with pages of one."""
    layers = random_layers(0)
    host = torch.zeros(LAYERS, SIZE, HEADS, DIM, dtype=torch.bfloat16)
    src, dst = torch.tensor([3, 9]), torch.tensor([5, 0])
    copies.transfer_kv_all_layer_mla(addresses(layers), addresses(list(host)), src, dst, ROW, LAYERS)
    assert all(torch.equal(host[layer, dst], layers[layer][src]) for layer in range(LAYERS))
    assert host.count_nonzero() <= LAYERS * 2 * HEADS * DIM
    states = torch.zeros(SIZE, LAYERS, 1, HEADS, DIM, dtype=torch.bfloat16)
    copies.transfer_kv_mamba_lf_pf(addresses(layers), states, src, dst, ROW, LAYERS * ROW, LAYERS)
    assert all(torch.equal(states[dst, layer, 0], layers[layer][src]) for layer in range(LAYERS))
    device = torch.zeros(SIZE, HEADS, DIM, dtype=torch.bfloat16)
    copies.transfer_kv_mamba_pf_lf(states, device, dst, torch.tensor([1, 2]), 2, ROW, LAYERS * ROW)
    assert torch.equal(device[[1, 2]], layers[2][src])


def test_a_row_behind_the_end_is_refused() -> None:
    rows = torch.zeros(4, 8)
    with pytest.raises(AssertionError, match="exceeds its buffer"):
        copies.transfer_kv_per_layer_mla(rows, rows.clone(), torch.tensor([4]), torch.tensor([0]), 32)


def test_drafts_form_a_chain_and_are_accepted_as_far_as_they_are_right() -> None:
    lengths, drafts = torch.tensor([5, 2]), 3
    mask = torch.ones(sum(drafts * (length + drafts) for length in (5, 2)), dtype=torch.bool)
    positions, index = torch.zeros(6, dtype=torch.int64), torch.full((2, 3), -1)
    following, sibling = torch.full((2, 3), -1), torch.full((2, 3), -1)
    nothing = torch.zeros(2, 2, dtype=torch.int64)
    speculative.build_tree_kernel_efficient_cpu(
        nothing, nothing, lengths, mask, positions, index, following, sibling, 1, 2, drafts, 0
    )
    assert positions.tolist() == [5, 6, 7, 2, 3, 4]
    assert index.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert following.tolist() == [[1, 2, -1]] * 2
    first = mask[: 3 * 8].view(3, 8)
    assert first[:, :5].all()
    assert first[:, 5:].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    # The target continues 10 with 11, 12, 13: of the first request all drafts are right, of the second none.
    candidates = torch.tensor([[10, 11, 12], [10, 99, 12]])
    says = torch.tensor([[11, 12, 13], [11, 12, 13]])
    predicts, accepted = torch.zeros(6, dtype=torch.int64), torch.full((2, 3), -1)
    count = torch.zeros(2, dtype=torch.int64)
    speculative.verify_tree_greedy_cpu(predicts, accepted, count, candidates, index, following, sibling, says)
    assert count.tolist() == [2, 0]
    assert accepted.tolist() == [[0, 1, 2], [3, -1, -1]]
    assert predicts.tolist() == [11, 12, 13, 11, 0, 0]


def test_slots_of_drafts() -> None:
    table = torch.arange(20).view(2, 10)
    out = torch.zeros(5, dtype=torch.int64)
    requests, starts, ends = torch.tensor([1, 0]), torch.tensor([3, 1]), torch.tensor([5, 4])
    speculative.assign_extend_cache_locs_cpu(requests, table, starts, ends, out, 10)
    assert out.tolist() == [13, 14, 1, 2, 3]
    speculative.assign_req_to_token_pool_cpu(requests, table, starts, ends, out + 100, 10)
    assert table[1, 3:5].tolist() == [113, 114]
    assert table[0, 1:4].tolist() == [101, 102, 103]
    rows = torch.arange(12, dtype=torch.int32).view(4, 3)
    strides = torch.tensor([12])
    speculative.copy_all_layer_kv_cache_cpu(
        torch.tensor([rows.data_ptr()], dtype=torch.uint64), strides, torch.tensor([0, 1]), torch.tensor([1, 3])
    )
    assert rows.tolist() == [[3, 4, 5], [9, 10, 11], [6, 7, 8], [9, 10, 11]]


def test_linear_attention_goes_on_from_its_states() -> None:
    """A sequence in one piece, in two, and token by token give the same."""
    torch.manual_seed(0)
    count, heads, channels = 6, 2, 5
    q, k, v = (torch.randn(1, count, heads, 4) for _ in range(3))
    decay, rate = -torch.rand(1, count, heads), torch.rand(1, count, heads)
    x, weight = torch.randn(channels, count), torch.randn(channels, 4)

    def run(cuts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        state, window = torch.zeros(2, heads, 4, 4), torch.zeros(2, channels, 3)
        slot, outputs, convolved = torch.tensor([1]), [], []
        for begin, end in zip([0, *cuts], [*cuts, count], strict=True):
            piece = slice(begin, end)
            bounds = torch.tensor([0, end - begin])
            arguments = (q[:, piece], k[:, piece], v[:, piece], decay[:, piece], rate[:, piece], state, bounds, slot)
            outputs.append(linear_attention.chunk_gated_delta_rule_cpu(*arguments)[0])
            old = torch.tensor([begin > 0])
            conv = linear_attention.causal_conv1d_fn_cpu
            convolved.append(conv(x[:, piece], weight, None, "silu", window, old, slot, bounds))
        return torch.cat(outputs, 1), torch.cat(convolved, 1), state, window

    whole = run([])
    for cuts in ([3], [1, 2, 3, 4, 5]):
        for found, expected in zip(run(cuts), whole, strict=True):
            torch.testing.assert_close(found, expected)
    updated, window = [], torch.zeros(1, channels, 3)
    for token in range(count):
        one = linear_attention.causal_conv1d_update_cpu(
            x[:, token][None], window, weight, None, "silu", torch.tensor([0])
        )
        updated.append(one[0])
    torch.testing.assert_close(torch.stack(updated, 1), whole[1])


IMPORTS = """
import sglang_cpu.imports as imports
imports.install()
import sgl_kernel
from sgl_kernel import verify_tree_greedy_cpu
from sgl_kernel.mamba import causal_conv1d_fn_cpu
assert verify_tree_greedy_cpu.__module__ == "sglang_cpu.speculative"
assert causal_conv1d_fn_cpu.__module__ == "sglang_cpu.linear_attention"
try:
    import sgl_kernel.scalar_type
except ImportError:
    pass
else:
    raise AssertionError("a submodule that does not exist")
try:
    sgl_kernel.none_such(1)
except NotImplementedError as error:
    print(error)
"""


def test_sgl_kernel_is_stood_in_for() -> None:
    found = importlib.util.find_spec("sgl_kernel")
    if found is not None and found.origin is not None:
        pytest.skip("has a real sgl_kernel")
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS / "sglang_cpu")}
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "sgl_kernel.none_such has no CPU version; sglang_cpu provides its name only\n"


def test_a_model_without_gpu_and_cpu_engine_is_refused_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "make_tiny_model.py"), str(tmp_path / "model")]
    # Without a PATH no tool of the driver is found, also where there is a GPU.
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": ""})
    assert done.returncode == 1
    assert done.stderr == ("make_tiny_model.py: this machine has no GPU; set SGLANG_USE_CPU_ENGINE=1 and try again\n")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("cpu_engine", ["", "1"])
def test_sglang_that_does_not_load_is_one_sentence(tmp_path: Path, cpu_engine: str) -> None:
    """As `python -m sglang.launch_server` and `sglang serve` begin, in an environment whose .pth file has run."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("has a GPU")
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "sglang" / "launch_server.py").write_text("")
    line = (SCRIPTS / "sglang_cpu" / "sglang_cpu.pth").read_text()
    program = f"{line}import runpy; runpy.run_module('sglang.launch_server', run_name='__main__')"
    environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": cpu_engine}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(SCRIPTS / "sglang_cpu")])
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    said = (
        "sglang_cpu: SGLang does not load on this machine, which has no GPU "
        "(operator torchvision::nms does not exist). Set SGLANG_USE_CPU_ENGINE=1 for its CPU engine.\n"
    )
    assert (done.stderr == said) is (cpu_engine == "")
    assert ("Traceback" in done.stderr) is (cpu_engine == "1")


def test_sglang_that_loads_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("word = 'loaded'")
    (tmp_path / "sglang" / "data.txt").write_text("text")
    line = (SCRIPTS / "sglang_cpu" / "sglang_cpu.pth").read_text()
    program = (
        f"{line}import sglang, importlib.resources as r\n"
        "print(sglang.word, (r.files('sglang') / 'data.txt').read_text(), sglang.__file__)"
    )
    environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(SCRIPTS / "sglang_cpu")])
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == f"loaded text {tmp_path / 'sglang' / '__init__.py'}\n", done.stderr
