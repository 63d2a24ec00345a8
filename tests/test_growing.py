"""Stores that grow: which chains are added, and what a training takes of them in each pass."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import in_two_processes
from torch.utils.data import Sampler

from opensora_perflow.hosts.chains import Part, Passes, chain_at, pass_begins
from opensora_perflow.hosts.clips import clips_digest
from opensora_perflow.hosts.storing import Workers, after_last, solve_chains
from opensora_perflow.hosts.storing import store as store_chains
from opensora_perflow.tools import cli
from opensora_perflow.training.shards import file_name
from opensora_perflow.training.store import ChainStore, Origin, chain_noise

TOLD = {"num_frames": 17, "height": 64, "width": 64, "ar": 1.0, "fps": 24}
LATENT, ROWS, EDGES = (1, 2, 2, 2), 3, (1.0, 0.5, 0.0)
ALONE = Workers()


class Solver:
    """A teacher that ends at k times the noise; `fails` at the shard that has this chain first, as one that is killed."""

    def __init__(self, seed=5, fails=None):
        self.origin = Origin(EDGES, "euler", 1, {}, "teacher", "a test", 1, {}, "float32", seed)
        self.fails, self.solved = fails, []

    def solve(self, part, first):
        if first == self.fails:
            raise KeyboardInterrupt
        chains = range(first, first + len(part.captions))
        self.solved += chains
        noise = torch.stack([chain_noise(self.origin.seed, chain, part.latent) for chain in chains])
        yield torch.stack([noise, 2 * noise], dim=1), None, None, None


def parts():
    shard = 0
    while True:
        yield Part([f"caption {shard}-{row}" for row in range(ROWS)], TOLD, LATENT, 8)
        shard += 1


def solve(out, wanted, solver=None, workers=ALONE, clips=None):
    progress = lambda total, what: lambda count: None  # noqa: E731
    return solve_chains(
        out, solver or Solver(), parts(), wanted, ["one", "two"], {"144p": {17: (1.0, 8)}}, workers, progress, clips
    )


def grow(out, more, solver=None, workers=ALONE, clips=None):
    return solve(out, after_last(out, workers) + more, solver, workers, clips)


def states(store, chain):
    return torch.stack([store.states(torch.tensor([chain]), torch.tensor([place]))[0] for place in range(len(EDGES))])


def listed(count):
    return [(chain, TOLD) for chain in range(count)]


def test_a_grown_store_is_the_one_that_is_written_at_once(tmp_path):
    assert solve(tmp_path / "grown", 4) == 6  # whole shards
    solver = Solver()
    assert grow(tmp_path / "grown", 4, solver) == 12 and solver.solved == list(range(6, 12))
    assert solve(tmp_path / "whole", 12) == 12
    for number in range(4):
        one, other = (tmp_path / name / file_name(number) for name in ("grown", "whole"))
        assert one.read_bytes() == other.read_bytes()
    store = ChainStore(tmp_path / "grown")
    noise = torch.stack([states(store, chain)[0] for chain in range(12)])
    assert len(noise.flatten(1).unique(dim=0)) == 12


def test_growing_after_a_kill_fills_the_gap_and_adds_after_the_last(tmp_path):
    """Rank 0 of two was killed at its second shard; rank 1 wrote its own."""
    with pytest.raises(KeyboardInterrupt):
        solve(tmp_path, 12, Solver(fails=6), Workers(0, 2))
    solve_alone = SimpleNamespace(rank=1, world=2, barrier=lambda: None)
    solve(tmp_path, 12, workers=solve_alone)
    store = ChainStore(tmp_path)
    assert len(store) == 9 and len(store.chains) == 6
    solver = Solver()
    assert grow(tmp_path, 3, solver) == 15 and solver.solved == [6, 7, 8, 12, 13, 14]
    assert len(ChainStore(tmp_path).chains) == 15


def test_a_folder_without_chains_does_not_grow(tmp_path):
    with pytest.raises(ValueError, match="holds no stored chains that --grow could add to; begin a store with --chains"):
        after_last(tmp_path, ALONE)
    read = SimpleNamespace(read_training_config=lambda *given: None, main=lambda cfg, out, chains, *rest: chains)
    solve(tmp_path, 6)
    given = dict(progress=None, data_path=None, first_window=0)
    assert store_chains(read, None, tmp_path, None, 5, **given) == 11
    assert store_chains(read, None, tmp_path, 7, None, **given) == 7


@pytest.mark.parametrize("options", [["--grow", "0"], ["--grow", "3", "--chains", "6"]])
def test_wrong_numbers_are_told_before_anything_is_read(options, capsys, tmp_path):
    try:
        status = cli.main(["store", "nothing.py", "--out", str(tmp_path), *options])
    except SystemExit as stop:  # argparse's own
        status = stop.code
    assert status == 2 and "--grow" in capsys.readouterr().err


def test_others_than_the_store_s_are_not_added(tmp_path):
    solve(tmp_path, 6)
    with pytest.raises(ValueError, match="was begun with other settings: seed is 5 there and 6 here"):
        grow(tmp_path, 3, Solver(seed=6))


class Table(dict):
    """As much of a pandas table as is asked."""

    columns = property(dict.keys)


def test_other_clips_with_the_same_captions_are_not_added(tmp_path):
    """Stores of earlier versions do not say which clips they have, and go on."""

    def clips(paths, sizes=(64, 64)):
        return clips_digest(SimpleNamespace(data=Table(path=np.array(paths), height=np.array(sizes))))

    names = ["a.mp4", "b.mp4"]
    assert clips(names) == clips(names) and len({clips(names), clips(names[::-1]), clips(names, (64, 32))}) == 3
    given = [SimpleNamespace(digest=clips(paths), of=lambda part, first: part) for paths in (names, ["a.mp4", "c.mp4"])]
    solve(tmp_path / "new", 6, clips=given[0])
    with pytest.raises(ValueError, match="was begun with other settings: clips is [0-9a-f]{16} there and [0-9a-f]{16} here"):
        grow(tmp_path / "new", 3, clips=given[1])
    assert grow(tmp_path / "new", 3, clips=given[0]) == 9
    solve(tmp_path / "old", 6)
    assert grow(tmp_path / "old", 3, clips=given[0]) == 9 and len(ChainStore(tmp_path / "old").chains) == 9


def test_one_process_writes_at_a_time(tmp_path):
    class Late(Solver):
        def solve(self, part, first):
            with pytest.raises(ValueError, match="another process writes to the store"):
                solve(tmp_path, 3)
            yield from super().solve(part, first)

    solve(tmp_path, 3, Late())
    assert solve(tmp_path, 3) == 3


def test_a_pass_has_the_chains_that_were_there_when_it_began(tmp_path, caplog):
    caplog.set_level("INFO")
    solve(tmp_path, 6)
    training_set, run = Passes(ChainStore(tmp_path)), ChainStore(tmp_path)
    before = [states(run, chain) for chain in range(6)]
    assert training_set.chains == listed(6) and not training_set.next()
    grow(tmp_path, 3)
    assert len(training_set.chains) == 6 and "trains from" not in caplog.text
    assert training_set.next() and training_set.chains == listed(9) and not training_set.next()
    assert f"trains from 9 chains of {tmp_path} now, 3 more" in caplog.text
    # The training's other store object, and a worker's, look when they are asked.
    fresh = ChainStore(tmp_path)
    assert torch.equal(states(run, 8), states(fresh, 8)) and run.caption(8) == "caption 2-2"
    assert all(torch.equal(states(run, chain), before[chain]) for chain in range(6))
    worker = ChainStore(tmp_path)
    grow(tmp_path, 3)
    assert chain_at(worker, "11-17-64-64") == (11, TOLD)
    with pytest.raises(ValueError, match="another process sees 13 chains of the store"):
        chain_at(worker, "12-17-64-64")


def test_a_pass_begins_where_a_sampler_is_iterated():
    """Not where one process asks for a length or looks into the table: others would have to ask as well."""

    class Asked(Sampler):
        def rows(self):
            return asked()

        def __len__(self):
            return int(self.rows())

        def __iter__(self):
            yield self.rows()

    def asked():
        return pass_begins()

    assert list(Asked()) == [True] and len(Asked()) == 0 and not asked()


def test_what_a_pass_has_follows_from_the_number_of_chains_alone(tmp_path):
    """Grown in two turns or written at once: the same rows, of the same chains."""
    solve(tmp_path / "grown", 3), grow(tmp_path / "grown", 6), solve(tmp_path / "whole", 9)
    grown, whole = (Passes(ChainStore(tmp_path / name)) for name in ("grown", "whole"))
    assert grown.chains == whole.chains
    for chain in range(9):
        assert torch.equal(states(grown.store, chain), states(whole.store, chain))


def test_chains_after_a_gap_wait(tmp_path, caplog):
    solve(tmp_path, 9)
    (tmp_path / "index-00000.json").write_text(
        (tmp_path / "index-00000.json").read_text().replace('"1": {', '"7": {').replace('"first": 3', '"first": 21')
    )
    (tmp_path / file_name(1)).rename(tmp_path / file_name(7))
    assert len(Passes(ChainStore(tmp_path)).chains) == 3
    assert "from the first 3 chains" in caplog.text and "6 after it wait" in caplog.text


def test_shards_that_were_left_out_are_not_waited_for(tmp_path):
    """Of clips that cannot be read: one of a shard's three, and all of the next one's."""

    class Clips:
        digest = "some clips"

        def of(self, part, first):
            return part.of({0: [0, 1, 2], 3: [0, 2], 6: []}.get(first, [1]))

    assert solve(tmp_path, 12, clips=Clips()) == 3 + 2 + 1
    store, again = ChainStore(tmp_path), Solver()
    assert [chain for chain, _ in store.chains] == [0, 1, 2, 3, 4, 9] and store.caption(9) == "caption 3-1"
    with pytest.raises(ValueError, match="holds no chain 6"):
        store.states(torch.tensor([6]), torch.tensor([1]))
    assert solve(tmp_path, 12, again, clips=Clips()) == 6 and not again.solved
    training_set = Passes(store)
    assert grow(tmp_path, 3, clips=Clips()) == 7 and training_set.next() and training_set.chains[-1] == (12, TOLD)


def test_another_store_in_the_same_place_is_refused(tmp_path):
    solve(tmp_path, 3)
    training_set = Passes(ChainStore(tmp_path))
    for path in tmp_path.iterdir():
        path.unlink()
    solve(tmp_path, 3, Solver(seed=6))
    with pytest.raises(ValueError, match="is another than when this training began: seed is 5 there and 6 here"):
        training_set.next()


def _agree(rank, folder):
    """Rank 0 adds chains between the looks of both; rank 1 looks first, so that it sees fewer."""
    training_set = Passes(ChainStore(folder))
    look = training_set.store.look_again

    def late():
        if rank == 1:
            look()
        dist.barrier()
        if rank == 0:
            solve(folder, 9)
            look()
        dist.barrier()

    training_set.store.look_again = late
    seen = []
    for _ in range(2):
        training_set.next()
        seen.append(len(training_set.chains))
    assert seen == [6, 9], seen


def test_processes_agree_on_a_pass(tmp_path):
    solve(tmp_path, 6)
    in_two_processes(_agree, tmp_path, tmp_path)


def _ask(rank, folders):
    assert after_last(folders[rank], Workers(rank, 2)) == 6


def test_two_processes_add_to_the_same_number(tmp_path):
    """The second asks when the first has already added a shard."""
    folders = [tmp_path / name for name in ("earlier", "later")]
    solve(folders[0], 6), solve(folders[1], 9)
    in_two_processes(_ask, tmp_path, folders)
