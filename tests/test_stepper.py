"""Step after step against mace-torch, which starts anew each time: what is kept must not be seen in the results."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from oracles import tolerance
from step_cases import ELEMENTS, WALKS, as_structures, assert_agree, build, crystal, frozen, moves, reference

from mace_fast import zoo
from mace_fast.errors import DeviceError, MissingToolError
from mace_fast.inference import FrozenMACE, Stepper, candidates, neighbours, packed
from mace_fast.inference import program as program_module
from mace_fast.inference import stepper as stepper_module
from mace_fast.inference.candidates import DeviceCandidates, HostCandidates
from mace_fast.inference.device_errors import explain_device_error, is_device_error
from mace_fast.inference.program import Bucket, StaticProgram
from mace_fast.inference.verlet import Verlet

# Splines of float64 models are good to 1e-12 of the largest weight.
TOLERANCE = 1e-9

SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact, no skin": {"skin": 0.0},
    "static": {"static": True},
    "static, no skin": {"static": True, "skin": 0.0},
    "static, wide skin, two programs": {"static": True, "skin": 1.3, "keep": 2},
    "static, varied": {"static": True, "varied": True},
}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build()


@pytest.fixture(scope="module")
def program(model: torch.nn.Module) -> FrozenMACE:
    return frozen(model)


def follow(stepper: Stepper, walk: list[Atoms], model: torch.nn.Module, limit: float = TOLERANCE) -> None:
    for number, atoms in enumerate(walk):
        (found,) = stepper(as_structures([atoms], model), forces=True, stress=True)
        assert set(found) == {"energy", "node_energy", "forces", "stress", "virials"}
        assert_agree(found, reference([atoms], model), limit, f"step {number}, {atoms}")


@pytest.mark.parametrize("settings", list(SETTINGS))
@pytest.mark.parametrize("walk", list(WALKS))
def test_every_walk(
    walk: str, settings: str, rng: np.random.Generator, model: torch.nn.Module, program: FrozenMACE
) -> None:
    follow(Stepper([program], **SETTINGS[settings]), list(WALKS[walk](rng)), model)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("walk", ["species", "numbers"])
def test_tables_of_species_pairs(walk: str, static: bool, rng: np.random.Generator) -> None:
    model = build("nonlinear_foundation")
    follow(Stepper([frozen(model)], static=static), list(WALKS[walk](rng)), model)


@pytest.mark.parametrize("static", [False, True])
def test_float32_is_as_near_the_truth_as_mace_torch(static: bool, rng: np.random.Generator) -> None:
    single = build(dtype=torch.float32)
    exact = copy.deepcopy(single).double()
    stepper = Stepper([frozen(single)], static=static)
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(3):
        for atoms in moves(rng):
            truth = reference([atoms], exact)["forces"]
            ours = stepper(as_structures([atoms], single))[0]["forces"]
            theirs = reference([atoms], single, torch.float32)["forces"]
            for who, forces in (("ours", ours), ("theirs", theirs)):
                errors[who].append(float(np.linalg.norm(forces - truth) / np.linalg.norm(truth)))
    ours_rms, theirs_rms = (float(np.sqrt(np.mean(np.square(errors[who])))) for who in ("ours", "theirs"))
    assert ours_rms <= 2 * theirs_rms, f"{ours_rms:.1e} against mace-torch's {theirs_rms:.1e}"


def test_the_skin_changes_no_bit_on_the_cpu(
    rng: np.random.Generator, model: torch.nn.Module, program: FrozenMACE
) -> None:
    steppers = [Stepper([program], skin=skin) for skin in (0.0, 0.1, 0.5, 2.0)]
    for atoms in moves(rng):
        results = [stepper(as_structures([atoms], model), stress=True)[0] for stepper in steppers]
        for other in results[1:]:
            for name, value in results[0].items():
                assert np.array_equal(value, other[name]), name
    rebuilds = [stepper.rebuilds for stepper in steppers]
    assert rebuilds[0] == 6 and rebuilds == sorted(rebuilds, reverse=True) and rebuilds[-1] < 3


@pytest.mark.parametrize("static", [False, True])
def test_lists_last_and_programs_are_reused(
    static: bool, rng: np.random.Generator, model: torch.nn.Module, program: FrozenMACE
) -> None:
    stepper, atoms = Stepper([program], static=static, skin=0.5), crystal(rng)
    home = atoms.positions.copy()
    for _ in range(20):
        atoms.positions = home + rng.uniform(-0.06, 0.06, home.shape)
        stepper(as_structures([atoms], model))
    assert stepper.rebuilds == 1 and stepper.captures == int(static)
    for _ in range(20):  # diffusion: new lists, of a size that changes little
        atoms.positions += rng.normal(0, 0.05, home.shape)
        stepper(as_structures([atoms], model))
    assert stepper.rebuilds > 1 and stepper.captures <= 2 * int(static)


@pytest.mark.parametrize(("static", "few", "lasts"), [(True, 10**9, True), (True, 0, False), (False, 10**9, False)])
def test_small_structures_have_a_wide_skin_in_static_programs(
    static: bool,
    few: int,
    lasts: bool,
    rng: np.random.Generator,
    model: torch.nn.Module,
    program: FrozenMACE,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nothing else is asked for: an atom may move by 0.4 A before another list is made."""
    monkeypatch.setattr(neighbours, "_FEW", few)
    stepper, atoms = Stepper([program], static=static), crystal(rng)
    stepper(as_structures([atoms], model))
    atoms.positions[0, 0] += 0.4
    stepper(as_structures([atoms], model))
    assert (stepper.rebuilds == 1) == lasts


@pytest.mark.parametrize("static", [False, True])
def test_a_list_that_is_kept_too_long_is_seen(
    static: bool,
    rng: np.random.Generator,
    model: torch.nn.Module,
    program: FrozenMACE,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The walks would notice: without the criterion they fail."""
    monkeypatch.setattr(Verlet, "holds", Verlet.same_atoms)
    walk = list(WALKS["moves"](rng))
    # In one crystal of some hundred the walk alone brings no pair from beyond the list so near that it counts.
    walk.append(walk[-1].copy())
    walk[-1].positions += rng.normal(0, 0.8, walk[-1].positions.shape)
    with pytest.raises(AssertionError, match="is off by"):
        follow(Stepper([program], static=static, skin=0.1), walk, model)


def test_a_list_that_outgrows_its_program_is_noticed_before_it_runs(
    rng: np.random.Generator, model: torch.nn.Module, program: FrozenMACE
) -> None:
    stepper, atoms = Stepper([program], static=True), crystal(rng)
    stepper(as_structures([atoms], model))
    edges = max(bucket.edges for _, bucket, *_ in stepper._programs)
    while True:
        atoms.set_cell(atoms.cell * 0.93, scale_atoms=True)
        (found,) = stepper(as_structures([atoms], model), stress=True)
        assert_agree(found, reference([atoms], model), TOLERANCE, "compressed")
        if stepper._list is not None and stepper._list.count > edges:
            break
    assert stepper.captures > 1
    small = StaticProgram(program, Bucket(len(atoms), 64, 1), forces=True, stress=False, capture=False)
    data = stepper._model_inputs(as_structures([atoms], model))
    assert stepper._list is not None
    with pytest.raises(ValueError, match="do not fit"):
        small.load(stepper._list.sorted_for(stepper._atoms(len(atoms), stepper._list)), data, (1,))
    with pytest.raises(AssertionError, match="load"):
        small.run()


def assert_same_but_for_the_order_of_sums(forces: np.ndarray, others: np.ndarray) -> None:
    """Of float32 models, with lists that were made elsewhere: in static programs an atom's edges lie in the order of
    their lengths at that place. In 100 crystals that moved this by 3e-7 of all forces together, and once by 1.2e-6:
    some roundings of partial sums, each of the size of the largest term. The limit is 4e-6."""
    difference = np.linalg.norm(forces - others) / np.linalg.norm(others)
    assert difference <= tolerance(torch.float32, 4), f"{difference:.1e} of the forces"


def test_lists_made_elsewhere_change_the_order_of_sums_alone(rng: np.random.Generator) -> None:
    model, atoms = build(dtype=torch.float32), crystal(rng)
    stepper, home = Stepper([frozen(model)], static=True), atoms.positions.copy()
    given, seen = [home + rng.normal(0, 0.04, home.shape) for _ in range(5)], []
    for first in range(5):
        stepper.forget_lists()  # the next is made at given[first]
        found = {}
        for number in [*range(first, 5), *range(first)]:
            atoms.positions = given[number]
            found[number] = stepper(as_structures([atoms], model))[0]["forces"]
        seen.append(found)
    for number in range(5):
        for found in seen:
            assert_same_but_for_the_order_of_sums(found[number], seen[0][number])
    assert any(not np.array_equal(found[0], seen[0][0]) for found in seen), "every order was the same"


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_of_the_caller_do_not_matter(
    mode: Any, static: bool, rng: np.random.Generator, model: torch.nn.Module, program: FrozenMACE
) -> None:
    structures = as_structures([crystal(rng)], model)
    (expected,) = Stepper([program], static=static)(structures, stress=True)
    stepper = Stepper([program], static=static)
    with mode():
        (found,) = stepper(structures, stress=True)
    (again,) = stepper(structures, stress=True)
    for name, value in expected.items():
        assert np.array_equal(found[name], value) and np.array_equal(again[name], value), name


def test_programs_are_bounded(rng: np.random.Generator, model: torch.nn.Module, program: FrozenMACE) -> None:
    stepper = Stepper([program], static=True, keep=3)
    for atoms in list(WALKS["oddities"](rng)) * 2:
        stepper(as_structures([atoms], model))
    assert len(stepper._programs) <= 3 < stepper.captures


@pytest.mark.parametrize("settings", ["exact", "static", "static, varied"])
def test_batches_of_mixed_sizes(
    settings: str, rng: np.random.Generator, model: torch.nn.Module, program: FrozenMACE
) -> None:
    odd = list(zoo.edge_case_structures([1, 6, 8], cutoff=4.5, seed=int(rng.integers(1000))).values())
    stepper = Stepper([program], **SETTINGS[settings])
    chosen = [odd[number] for number in rng.permutation(len(odd))[:6]]
    for step in range(4):
        (found,) = stepper(as_structures(chosen, model), stress=True)
        assert_agree(found, reference(chosen, model), TOLERANCE, f"step {step}")
        if step == 1:
            chosen = [*chosen[::-1], crystal(rng)]
        for atoms in chosen:
            atoms.positions += rng.normal(0, 0.03, atoms.positions.shape)
            if atoms.pbc.all():
                atoms.set_cell(atoms.cell * 1.003, scale_atoms=True)


@pytest.mark.parametrize("static", [False, True])
def test_committee_and_two_steppers(static: bool, rng: np.random.Generator) -> None:
    models = [build(seed=seed) for seed in range(2)]
    programs = [frozen(each) for each in models]
    together = Stepper(programs, static=static)
    apart = [Stepper([each], static=static) for each in programs]
    for step, atoms in enumerate(moves(rng)):
        given = as_structures([atoms], models[0])
        found = together(given, stress=True)
        for each, alone, mine in zip(models, apart, found, strict=True):
            assert_agree(mine, reference([atoms], each), TOLERANCE, f"step {step}")
            for name, value in alone(given, stress=True)[0].items():
                assert np.array_equal(value, mine[name])


@pytest.mark.parametrize("walk", ["moves", "cells", "numbers", "species", "boundaries"])
def test_lists_of_host_and_device_take_turns(
    walk: str,
    rng: np.random.Generator,
    model: torch.nn.Module,
    program: FrozenMACE,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a device's memory that is not the host's: whatever is not brought over, or over what is newer, is seen."""
    monkeypatch.setattr(packed, "has_own_memory", lambda device: True)
    stepper = Stepper([program], static=True, skin=1.0)
    monkeypatch.setattr(stepper.search, "small", lambda structures, cutoff: rng.random() < 0.6)

    def on_host(tensor: torch.Tensor) -> bool:
        found = stepper._list
        of_edges = tensor.dtype == torch.int32 or (found is not None and tensor is found.shifts)
        return not of_edges or (
            isinstance(found, HostCandidates) and not (tensor is found.shifts and found._on_device is not None)
        )

    monkeypatch.setattr(program_module, "_on_host", on_host)
    for number, atoms in enumerate(each for _ in range(4) for each in WALKS[walk](rng)):
        # Two programs: a list is loaded into one of them when it is found, into the other later, or never.
        stress = bool(rng.random() < 0.5)
        (found,) = stepper(as_structures([atoms], model), stress=stress)
        assert_agree(found, reference([atoms], model), TOLERANCE, f"step {number}, {stress=}")


def test_lists_are_found_on_the_host_where_it_can_be_done(
    rng: np.random.Generator, model: torch.nn.Module, program: FrozenMACE, monkeypatch: pytest.MonkeyPatch
) -> None:
    structures, found = as_structures([crystal(rng)], model), []
    for compiler, kind in ((True, HostCandidates), (False, DeviceCandidates)):
        monkeypatch.setattr(candidates, "_can_sort_on_host", lambda compiler=compiler: compiler)
        stepper = Stepper([program], static=True)
        found.append(stepper(structures, stress=True)[0])
        assert type(stepper._list) is kind
    assert_agree(*found, 1e-12, "with and without a compiler")


@pytest.mark.parametrize("static", [False, True])
def test_only_what_is_asked_for(
    static: bool, rng: np.random.Generator, model: torch.nn.Module, program: FrozenMACE
) -> None:
    stepper, atoms = Stepper([program], static=static), crystal(rng)
    expected = reference([atoms], model)
    for forces, stress, names in (
        (False, False, set()),
        (True, False, {"forces"}),
        (False, True, {"forces", "stress", "virials"}),
        (False, False, set()),
    ):
        (found,) = stepper(as_structures([atoms], model), forces=forces, stress=stress)
        assert set(found) == {"energy", "node_energy"} | names
        assert_agree(found, expected, TOLERANCE, str(names))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("variant", ["embeddings", "embedding_readout"])
def test_embedded_charge_and_head_change(variant: str, static: bool, rng: np.random.Generator) -> None:
    """Nothing moves meanwhile: list and program are those of the step before."""
    heads = ("first", "second")
    model = zoo.build(replace(zoo.small_variants()[variant], heads=heads), seed=0, dtype=torch.float64)
    stepper, atoms = Stepper([frozen(model)], static=static), crystal(rng)
    seen = {}
    for charge, spin, head in ((0, 1, 0), (1, 1, 0), (1, 1, 1), (-1, 1, 1), (-1, 3, 1), (-2, 3, 0), (0, 1, 0)):
        atoms.info.update(charge=charge, spin=spin)
        features = {"total_charge": np.array([float(charge)]), "total_spin": np.array([float(spin)])}
        given = replace(as_structures([atoms], model, features), head=head)
        (found,) = stepper(given, stress=True)
        what = f"{charge=}, {spin=}, head {heads[head]}"
        assert_agree(found, reference([atoms], model, head=heads[head]), TOLERANCE, what)
        assert seen.setdefault(what, found["energy"][0]) == found["energy"][0]
    assert len(set(seen.values())) == len(seen) == 6, "each has an energy of its own"
    assert stepper.rebuilds == 1 and stepper.captures == int(static)


@pytest.mark.parametrize("static", [False, True])
def test_changed_parameters_are_noticed(static: bool, rng: np.random.Generator) -> None:
    model, atoms = build(), crystal(rng)
    program = frozen(model)
    stepper = Stepper([program], static=static)
    stepper(as_structures([atoms], model))
    with torch.no_grad():
        for each in (model, program):
            each.interactions[0].conv_tp_weights.layer0.weight.mul_(1.4)
    (found,) = stepper(as_structures([atoms], model), stress=True)
    assert_agree(found, reference([atoms], model), TOLERANCE, "changed")


def test_results_are_not_overwritten(rng: np.random.Generator, model: torch.nn.Module, program: FrozenMACE) -> None:
    stepper, atoms = Stepper([program], static=True), crystal(rng)
    first = stepper(as_structures([atoms], model))[0]["forces"]
    kept = first.copy()
    atoms.positions += 0.05 * rng.normal(size=atoms.positions.shape)
    stepper(as_structures([atoms], model))
    assert np.array_equal(first, kept)


def test_an_error_leaves_nothing_behind(
    rng: np.random.Generator, model: torch.nn.Module, program: FrozenMACE, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper, atoms = Stepper([program], static=True), crystal(rng)
    stepper(as_structures([atoms], model))
    with monkeypatch.context() as broken:
        broken.setattr(StaticProgram, "run", lambda self: (_ for _ in ()).throw(RuntimeError("stop")))
        with pytest.raises(RuntimeError, match="stop"):
            stepper(as_structures([atoms], model))
    assert not stepper._programs and stepper._list is None
    assert_agree(stepper(as_structures([atoms], model))[0], reference([atoms], model), TOLERANCE, "after")


@pytest.mark.parametrize("lost", [False, True])
def test_errors_of_a_device_say_what_to_do(lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(device: torch.device) -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")
    assert is_device_error(error)
    assert not is_device_error(RuntimeError("shapes do not match"))
    assert not is_device_error(torch.cuda.OutOfMemoryError("CUDA out of memory, CUDA error"))
    said = explain_device_error(error, torch.device("cuda:0"))
    assert "illegal memory access" in said and "TORCH_USE_CUDA_DSA" not in said
    assert ("start a new one" in said) == lost and ("next call makes new ones" in said) != lost


def test_wrong_arguments(program: FrozenMACE) -> None:
    for skin in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="skin="):
            Stepper([program], skin=skin)
    with pytest.raises(ValueError, match="one of vesin"):
        Stepper([program], neighbours="vesin-cuda")
    if not torch.cuda.is_available():
        with pytest.raises(MissingToolError, match="cuda_graph=False"):
            Stepper([program], cuda_graph=True)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies(clone: Any, rng: np.random.Generator, model: torch.nn.Module, program: FrozenMACE) -> None:
    stepper, atoms = Stepper([program], skin=0.7, static=True), crystal(rng)
    expected = stepper(as_structures([atoms], model))[0]
    copied = clone(stepper)
    assert copied.skin == 0.7 and copied.rebuilds == 0
    assert np.array_equal(copied(as_structures([atoms], model))[0]["forces"], expected["forces"])


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("neighbours", [None, "vesin-cuda"])
@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("walk", list(WALKS))
def test_every_walk_on_a_gpu(
    walk: str, cuda_graph: bool, neighbours: str | None, rng: np.random.Generator, model: torch.nn.Module
) -> None:
    """Lists from the host, as small structures have them, and from the GPU."""
    stepper = Stepper([frozen(model, "cuda")], cuda_graph=cuda_graph, neighbours=neighbours)
    follow(stepper, list(WALKS[walk](rng)), model)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["nonlinear_foundation", "pair_repulsion", "embeddings", "L2"])
def test_every_kind_of_model_on_a_gpu(variant: str, rng: np.random.Generator) -> None:
    model = build(variant)
    stepper, plain = Stepper([frozen(model, "cuda")]), Stepper([frozen(model)])
    features = {"total_charge": np.array([1.0]), "total_spin": np.array([2.0])} if variant == "embeddings" else None
    for number, atoms in enumerate([*WALKS["moves"](rng), *WALKS["species"](rng), *WALKS["numbers"](rng)]):
        given = as_structures([atoms], model, features)
        assert_agree(stepper(given, stress=True)[0], plain(given, stress=True)[0], TOLERANCE, f"step {number}")


@pytest.mark.gpu
def test_new_species_and_structures_wait_once(rng: np.random.Generator, model: torch.nn.Module) -> None:
    """Small structures that were not there before: what they bring to nodes is replayed too, and only results are
    waited for."""
    stepper, plain = Stepper([frozen(model, "cuda")], skin=0.0, varied=True), Stepper([frozen(model)])
    crystals, given = [crystal(rng) for _ in range(3)], []
    for _ in range(6):
        for atoms in crystals:
            atoms.numbers[:] = rng.permutation(atoms.numbers)
            atoms.positions += rng.normal(0, 0.02, atoms.positions.shape)
        given.append(as_structures(crystals, model))
    for structures in [*given, *given]:  # every program that there will be, and its graphs
        assert_agree(stepper(structures)[0], plain(structures)[0], TOLERANCE, "first")
    assert any(each._node_graph is not None for each in stepper._programs.values())
    captures, found = stepper.captures, []
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for structures in given:
                found.append(stepper(structures)[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([each for each in waits if "called a synchronizing" in str(each.message)]) <= 6
    assert stepper.captures == captures
    for structures, results in zip(given, found, strict=True):
        assert_agree(results, plain(structures)[0], TOLERANCE, "later")


@pytest.mark.gpu
def test_graphs_follow_changed_parameters(rng: np.random.Generator) -> None:
    model, atoms = build(), crystal(rng)
    program = frozen(model, "cuda")
    stepper = Stepper([program])
    for factor in (1.0, 1.4, 0.8):
        with torch.no_grad():
            for each in (model, program):
                each.interactions[0].conv_tp_weights.layer0.weight.mul_(factor)
        for _ in range(2):
            (found,) = stepper(as_structures([atoms], model), stress=True)
            assert_agree(found, reference([atoms], model), TOLERANCE, f"factor {factor}")


@pytest.mark.gpu
def test_steppers_take_turns_on_streams_of_their_own(rng: np.random.Generator) -> None:
    models = [build(seed=seed) for seed in range(3)]
    steppers = [Stepper([frozen(each, "cuda")]) for each in models]
    streams = [torch.cuda.Stream() for _ in models]
    for atoms in [*moves(rng), *WALKS["numbers"](rng)]:
        for each, stepper, stream in zip(models, steppers, streams, strict=True):
            with torch.cuda.stream(stream):
                (found,) = stepper(as_structures([atoms], each), stress=True)
            assert_agree(found, reference([atoms], each), TOLERANCE, str(atoms))


@pytest.mark.gpu
def test_steps_on_a_gpu_repeat_bit_for_bit_and_take_no_memory(rng: np.random.Generator) -> None:
    model = build(dtype=torch.float32)
    stepper, atoms = Stepper([frozen(model, "cuda")]), crystal(rng).repeat((2, 2, 2))
    home, given = atoms.positions.copy(), []
    for _ in range(300):
        given.append(home + rng.normal(0, 0.04, home.shape))
    seen, memory = [], []
    for number in range(900):
        atoms.positions = given[number % 300]
        seen.append(stepper(as_structures([atoms], model), stress=number % 3 == 0)[0]["forces"])
        memory.append(torch.cuda.memory_reserved())
    for number in range(300):
        assert_same_but_for_the_order_of_sums(seen[number + 300], seen[number])
    again = Stepper([frozen(model, "cuda")])
    for number in range(20):
        atoms.positions = given[number]
        assert np.array_equal(again(as_structures([atoms], model), stress=number % 3 == 0)[0]["forces"], seen[number])
    assert memory[-1] <= memory[600], "memory grows"


@pytest.mark.gpu
def test_a_thousand_atoms_take_little_memory(rng: np.random.Generator) -> None:
    """A quarter of a GiB for a medium model, whose edges' weights alone would take several; mace-torch takes 10."""
    model = zoo.build("mp0-medium", elements=ELEMENTS, dtype=torch.float32)
    program, atoms = frozen(model, "cuda"), crystal(rng).repeat((5, 5, 5))
    assert len(atoms) == 1000
    # Some sixty neighbours within the cutoff, as in most materials.
    atoms.set_cell(atoms.cell * (1000 / 0.0685 / atoms.get_volume()) ** (1 / 3), scale_atoms=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (found,) = Stepper([program])(as_structures([atoms], model), stress=True)
    torch.cuda.synchronize()
    assert np.isfinite(found["forces"]).all()
    assert torch.cuda.max_memory_allocated() - before < 0.6 * 2**30


@pytest.mark.gpu
def test_a_step_waits_once(rng: np.random.Generator, model: torch.nn.Module) -> None:
    """Within a list, with positions and cell that change: nothing but the results is waited for."""
    stepper, atoms = Stepper([frozen(model, "cuda")]), crystal(rng)
    for stress in (False, True):
        for _ in range(2):
            stepper(as_structures([atoms], model), stress=stress)
    rebuilds = stepper.rebuilds
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for step in range(6):
                atoms.positions += rng.uniform(-0.01, 0.01, atoms.positions.shape)
                if step > 2:
                    atoms.set_cell(atoms.cell * 1.0005, scale_atoms=True)
                stepper(as_structures([atoms], model), stress=step % 2 == 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([each for each in waits if "called a synchronizing" in str(each.message)]) <= 6
    assert stepper.rebuilds == rebuilds


@pytest.mark.gpu
def test_lack_of_memory_is_survived(
    rng: np.random.Generator, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper, atoms = Stepper([frozen(model, "cuda")]), crystal(rng)
    expected = stepper(as_structures([atoms], model))[0]
    with monkeypatch.context() as broken:

        def allocate(self: StaticProgram) -> None:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")

        broken.setattr(stepper_module.StaticProgram, "run", allocate)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            stepper(as_structures([atoms], model))
    found = stepper(as_structures([atoms], model))[0]
    assert np.array_equal(found["forces"], expected["forces"])


@pytest.mark.gpu
def test_an_error_while_capturing_is_survived(
    rng: np.random.Generator, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper, atoms = Stepper([frozen(model, "cuda")]), crystal(rng)
    original, calls = StaticProgram._evaluate, []

    def stop_at_capture(self: StaticProgram) -> None:
        original(self)
        calls.append(None)
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()  # not allowed here

    with monkeypatch.context() as broken:
        broken.setattr(StaticProgram, "_evaluate", stop_at_capture)
        with pytest.raises(DeviceError, match="next call makes new ones"):
            stepper(as_structures([atoms], model))
    assert calls
    assert_agree(stepper(as_structures([atoms], model))[0], reference([atoms], model), TOLERANCE, "after")
