"""What `knn_memory.py` claims, checked: python -m pytest examples/test_knn_memory.py"""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples import knn_memory
from examples.knn_memory import INDEXES, FaissMemory, RecordingMemory
from fast import FastConfig, FastLlama, FastMemory, load_memory, save_memory
from fast.linear import Limits

faiss = pytest.importorskip("faiss", reason="needs faiss-cpu")

TOLERANCE = 2e-5  # float32 sums in another order


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The graph of HNSW depends on which thread comes first; and two thread pools on a busy machine wait for each other."""
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


def small_model(**changes) -> FastLlama:
    """4 layers, 2 of them with memory, a window of 16; heads of 10 numbers, which are stored as 16."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 61, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "mem_layers": (1, 2), "max_position_embeddings": 16, "last_context_length": 8, "mem_dtype": "float32",
    }  # fmt: skip
    return FastLlama(FastConfig(**settings | changes)).eval()


def ids(T: int, B: int = 1) -> torch.Tensor:
    return torch.randint(3, 61, (B, T), generator=torch.Generator().manual_seed(T))


@torch.no_grad()
def read(model, segments, new_memory=FastMemory, K=None, B=1) -> torch.Tensor:
    """Logits of all tokens, fed in segments."""
    cache = model.new_cache(new_memory, mem_topk=K)
    return torch.cat([model(part, cache)[0] for part in ids(sum(segments), B).split(segments, dim=1)], dim=1)


def naive(q, k, v, K):
    """q (T, D), k and v (S, D): the K best keys by sorting, in float64."""
    scores = q.double() @ k.double().T / q.shape[1] ** 0.5
    kth = scores.sort(descending=True).values[:, K - 1 : K]
    scores = scores.masked_fill(scores < kth, -torch.inf)
    return scores.softmax(dim=-1) @ v.double(), scores.logsumexp(dim=-1)


def clustered(
    n: int, queries: int, kind=RecordingMemory, **settings
) -> tuple[RecordingMemory, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A memory of n keys around 50 centres, in 2 heads of 16 numbers; queries (1, 2, queries, 16) near some keys; k and v."""
    torch.manual_seed(1)
    centres = torch.randn(50, 16)
    k = (centres[torch.randint(50, (2, n))] + 0.3 * torch.randn(2, n, 16))[None]
    v = torch.randn(1, 2, n, 16)
    q = 2 * (k[:, :, torch.randint(n, (queries,))] + 0.1 * torch.randn(1, 2, queries, 16))
    config = FastConfig(mem_dtype="float32", mem_topk=settings.pop("K"))
    memory = kind(config, **settings)
    memory.append(k, v)
    return memory, q, k, v


# ------------------------------------------------------------------------------------------------- What it computes


@pytest.mark.parametrize("G", [4, 2])
@pytest.mark.parametrize("index", ["flat", "ivf"])
def test_with_k_as_large_as_memory_it_is_attention_to_all_of_it(index, G):
    model, segments = small_model(num_key_value_heads=G), [50, 1, 9, 1, 30]
    found = read(model, segments, partial(FaissMemory, index=index), K=1000, B=2)
    torch.testing.assert_close(found, read(model, segments, B=2), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"mem_dtype": "float8_e4m3fn"}])
def test_flat_finds_what_the_exact_search_in_torch_finds(changes):
    model, segments = small_model(**changes), [50, 1, 9, 1, 30]
    exact = read(model, segments, K=3)
    torch.testing.assert_close(read(model, segments, FaissMemory, K=3), exact, rtol=0, atol=TOLERANCE)
    assert (exact - read(model, segments)).abs().max() > 100 * TOLERANCE  # three keys are not all

    class SmallBlocks(FaissMemory):
        BLOCK = 7  # keys from many blocks

    slow = partial(SmallBlocks, limits=Limits(gathered=1))  # a query at a time
    torch.testing.assert_close(read(model, segments, slow, K=3), exact, rtol=0, atol=TOLERANCE)


def test_flat_is_the_formula():
    memory, q, k, v = clustered(300, 20, K=5)
    out, lse = memory.attend(q, None)
    for g in range(2):
        expected, expected_lse = naive(q[0, g], k[0, g], v[0, g], 5)
        torch.testing.assert_close(out[0, g].double(), expected, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(lse[0, g].double(), expected_lse, rtol=0, atol=TOLERANCE)


def test_gradients_are_those_of_the_exact_search_in_torch():
    def gradients(new_memory):
        model = small_model()
        logits, _ = model(ids(40), model.new_cache(new_memory, mem_topk=3))
        logits.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradients(FastMemory)
    torch.testing.assert_close(gradients(FaissMemory), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# ------------------------------------------------------------------------------------------------ Approximate indexes


@pytest.mark.parametrize(("index", "settings"), [("hnsw", {}), ("ivf", {"nprobe": 8})])
def test_approximate_indexes_find_most_of_the_best_keys(index, settings):
    memory, q, _, _ = clustered(4000, 50, K=10, index=index, **settings)
    memory.attend(q, None)
    assert memory.recall() > 0.95
    assert memory.indexes[0].ntotal == 4000 and "Flat" in type(memory.indexes[0]).__name__


def test_more_work_finds_more():
    for index, name, amounts in (("hnsw", "ef_search", (10, 400)), ("ivf", "nprobe", (1, 64))):
        recalls = []
        for amount in amounts:
            memory, q, _, _ = clustered(4000, 50, K=100, index=index, **{name: amount})
            memory.attend(q, None)
            recalls.append(memory.recall())
        assert recalls[0] < recalls[1] and recalls[1] > 0.97


def test_what_was_not_found_has_no_weight():
    memory, q, k, v = clustered(4000, 20, K=1000, index="ivf", nprobe=1)  # a list holds fewer than 1000
    out, lse = memory.attend(q, None)
    found = memory.search(q)
    assert (found == -1).any()
    for g in range(2):
        for t, tokens in enumerate(found[0, g]):
            tokens = tokens[tokens >= 0]
            expected, expected_lse = naive(q[0, g, t : t + 1], k[0, g, tokens], v[0, g, tokens], len(tokens))
            torch.testing.assert_close(out[0, g, t].double(), expected[0], rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(lse[0, g, t].double(), expected_lse[0], rtol=0, atol=TOLERANCE)


def test_a_query_that_finds_nothing_leaves_all_weight_to_the_local_context():
    class Lost(FaissMemory):
        def search(self, q):
            return torch.full((*q.shape[:3], 5), -1)

    memory, q, _, _ = clustered(100, 3, Lost, K=5)
    out, lse = memory.attend(q, None)
    assert out.isfinite().all() and (lse < -1e30).all()


def test_lists_are_made_once_there_are_tokens_enough_and_anew_as_memory_grows():
    memory, q, k, v = clustered(1000, 4, K=5, index="ivf")
    lists = []
    for _ in range(10):
        memory.attend(q, None)
        assert memory.indexes[0].ntotal == memory.length
        lists.append(getattr(memory.indexes[0], "nlist", None))
        memory.append(k, v)
    assert lists == [None, None, *[54] * 8]  # sqrt(3000)
    memory.append(*(x.repeat(1, 1, 2, 1) for x in (k, v)))
    memory.attend(q, None)
    assert memory.indexes[0].nlist == 114 and memory.length == 13000  # the next after 4 * 3000


# ------------------------------------------------------------------------------------------------- As part of a cache


@torch.no_grad()
def test_forks_go_on_apart():
    model = small_model(mem_topk=3)
    document, futures = ids(60), (ids(31), ids(33))

    def go_on(cache, future):
        return torch.cat([model(part, cache)[0] for part in future.split(5, dim=1)], dim=1)

    expected = []
    for future in futures:
        _, alone = model(document, model.new_cache(FaissMemory))
        expected.append(go_on(alone, future))
    _, cache = model(document, model.new_cache(FaissMemory))
    twin = cache.fork()
    for one, future, logits in zip((twin, cache), reversed(futures), reversed(expected)):
        torch.testing.assert_close(go_on(one, future), logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("index", INDEXES)
def test_what_a_fork_adds_is_never_found_by_the_other(index):
    memory, q, k, v = clustered(3000, 20, K=5, index=index)
    twin = memory.fork()
    assert all(a is b for a, b in zip(memory.indexes, twin.indexes))  # nothing is copied before it must be
    before = memory.attend(q, None)
    twin.append(10 * k[:, :, :100], v[:, :, :100])
    twin.attend(q, None)
    assert (twin.search(q) >= 3000).any() and twin.indexes[0].ntotal == 3100
    assert all(torch.equal(a, b) for a, b in zip(before, memory.attend(q, None))) and memory.indexes[0].ntotal == 3000


def test_forks_of_a_memory_that_was_not_asked_yet_share_its_indexes():
    memory, *_ = clustered(100, 1, K=5)
    assert memory.indexes == []
    assert memory.fork().indexes is memory.fork().indexes is memory.indexes != []


@pytest.mark.parametrize("index", INDEXES)
def test_rows_that_go_on_from_one_have_indexes_of_their_own(index):
    memory, q, k, v = clustered(3000, 20, K=5, index=index)
    before, rows = memory.attend(q, None), memory.fork()
    rows.expand(2)
    for both, one in zip(rows.attend(q.expand(2, -1, -1, -1), None), before):
        torch.testing.assert_close(both, one.expand_as(both), rtol=0, atol=TOLERANCE)
    near = torch.cat((10 * k[:, :, :100], torch.zeros_like(k[:, :, :100])))
    rows.append(near, v[:, :, :100].expand(2, -1, -1, -1))
    found = rows.attend(q.expand(2, -1, -1, -1), None), rows.search(q.expand(2, -1, -1, -1))
    assert (found[1] >= 3000).flatten(1).any(dim=1).tolist() == [True, False]
    assert all(torch.equal(a, b) for a, b in zip(before, memory.attend(q, None))) and memory.indexes[0].ntotal == 3000


@torch.no_grad()
def test_a_saved_memory_is_indexed_when_it_is_first_asked(tmp_path):
    model = small_model(mem_topk=3)
    _, cache = model(ids(60), model.new_cache(FaissMemory))
    save_memory(tmp_path / "memory", cache, model)
    loaded = load_memory(tmp_path / "memory", model, FaissMemory)
    assert loaded.layers[1].memory.indexes == []
    expected, _ = model(ids(5), cache)
    torch.testing.assert_close(model(ids(5), loaded)[0], expected, rtol=0, atol=TOLERANCE)


# ---------------------------------------------------------------------------------------------------------- Mistakes


@torch.no_grad()
def test_padded_batches_are_refused():
    model = small_model(mem_topk=3)
    mask = torch.ones(2, 40, dtype=torch.long)
    model(ids(40, 2), model.new_cache(FaissMemory), mask)  # nothing is padding
    mask[1, :5] = 0
    with pytest.raises(ValueError, match="no padded batches"):
        model(ids(40, 2), model.new_cache(FaissMemory), mask)


def test_settings_that_cannot_be_are_refused_by_name():
    with pytest.raises(ValueError, match="needs mem_topk"):
        FaissMemory(FastConfig())
    with pytest.raises(ValueError, match="index must be one of"):
        FaissMemory(FastConfig(mem_topk=3), index="tree")


def run_main(*flags) -> None:
    sys.argv = ["knn_memory.py", *flags]
    knn_memory.main()


@pytest.fixture(autouse=True)
def same_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def test_a_missing_faiss_is_one_line_that_names_the_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="^FaissMemory needs Faiss: pip install faiss-cpu$"):
        FaissMemory(FastConfig(mem_topk=3))
    with pytest.raises(SystemExit):
        run_main("--index", "flat")
    assert "pip install faiss-cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--trials", "0"],
        ["--topk", "few"],
        ["--topk", "0"],
        ["--index", "tree"],
        ["--lengths", "10"],
        ["--model", "nowhere"],
        ["--seed", "-1"],
    ],
)
def test_mistakes_in_flags_get_one_line_and_status_2(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(*flags)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and len(err.splitlines()) == 1


def test_the_program_prints_a_row_for_each_index_and_k(capsys):
    run_main("--length", "600", "--trials", "1", "--topk", "4,16", "--index", "torch", "flat", "hnsw")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1:3] for line in lines[2:]] == [
        ["torch", "all"], ["torch", "4"], ["torch", "16"], ["flat", "4"], ["flat", "16"], ["hnsw", "4"], ["hnsw", "16"],
    ]  # fmt: skip
    assert all(line.count("|") == 8 for line in lines)
    assert [line.split(" | ")[6] for line in lines if "| flat" in line] == ["100.0% |"] * 2
