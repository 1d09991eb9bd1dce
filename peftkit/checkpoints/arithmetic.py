"""Weighted sums of stored LoRAs, written as one that needs none of them: `Σ wᵢ ΔWᵢ`, with `ΔWᵢ = sᵢ BᵢAᵢ`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from peftkit import storage
from peftkit.also_train import InPlace
from peftkit.checkpoints import lowrank, task_vectors
from peftkit.checkpoints.approximation import Approximation, Nearness
from peftkit.checkpoints.computed import Matrices, as_stored, write
from peftkit.checkpoints.implied import Implied, Pair, implied
from peftkit.checkpoints.weighting import Folder, Weighted, weighted
from peftkit.dtypes import check_dtype
from peftkit.hosts import Host
from peftkit.storage import Origin, StorageError, Stored
from peftkit.storage.fingerprint import disagreeing, fingerprint, joined
from peftkit.targets import PerSite

Rank = int | Mapping[str, int] | str

HOWS = ("concatenate", "svd", "ties", "dare", "dare_ties")


class Term(NamedTuple):
    """What one adapter has at a site: the number of the adapter, its weight, and its pair."""

    number: int
    weight: float
    pair: Pair

    @property
    def factor(self) -> float:
        """`w · s`."""
        return self.weight * self.pair.scale


def combine(
    adapters: Weighted,
    out: Folder,
    *,
    how: str = "concatenate",
    r: Rank | None = None,
    density: float | None = None,
    seed: int = 0,
    iterations: int | None = None,
    dtype: torch.dtype | None = None,
) -> Approximation:
    """Write the weighted sum of stored LoRAs to the directory `out`, as a LoRA of its own. No model is built.

    Sites are those of all adapters together; where one has none, its change there is zero. A negative weight subtracts,
    and one adapter alone is scaled. What an adapter stores whole, modules and rows of `also_train`, is taken over from
    an adapter of weight 1, if no other has anything there; one of weight 0 is left out altogether, and not read.

    Args:
        adapters: directories with weights, 1 where none is given; a sequence may name a directory more than once.
        how: what becomes of the sum ΔW of each site.

            - `"concatenate"`: all pairs side by side, the ranks added up. Exact: A is not changed, and `w · s` goes into
              B, which is rounded once; not even that where all `w · s` are equal or differ by powers of 2.
            - `"svd"`: the nearest matrix of rank `r` (Eckart–Young), without computing ΔW.
            - `"ties"` (arXiv 2306.01708): each ΔW trimmed to its largest `density`, times its weight; at each place
              the mean of those that have the sign of their sum. Equal weights are the paper's λ; of others, which it
              does not have, peft elects the sign before it takes them times their weights.
            - `"dare"` (arXiv 2311.03099): of each ΔW a random `density` stays, divided by it, then the weighted sum.
            - `"dare_ties"`: DARE, then TIES' signs and mean in place of the sum.

            The last three compute ΔW a site at a time, in fp64, and end with the nearest matrix of rank `r`.
        r: rank, or ranks by pattern, or `"full"` for as much as is needed to lose nothing.
        density: the share that stays, in (0, 1].
        seed: of what DARE draws, which depends on it, the site's name and the number of the adapter alone.
        iterations: for the last three, as in `extract`.
        dtype: of the result; None is the widest of the adapters' for a concatenation that it can hold exactly, and at
            least fp32 for all others.

    Returns:
        What of ΔW, as the method makes it, is kept at each site.

    Raises:
        StorageError: an adapter that cannot be read, is no LoRA, or is relative to values of its base; adapters of
            different bases or sizes; what is stored whole and cannot be added.
        ValueError: a weight that is not finite, weights that are all zero, an unknown `how`, settings that do not go
            with it. TypeError: `adapters` or `seed` of another kind.
    """
    named = {i: (path, weight) for i, (path, weight) in enumerate(weighted(adapters)) if weight}
    if not named:
        raise ValueError("adapters: at least one with a weight other than 0; nothing else is left to write")
    _check_settings(how, r, density, seed, iterations)
    check_dtype(dtype)
    read = [storage.read(path) for path, _ in named.values()]
    weights = [weight for _, weight in named.values()]
    _check_bases(read)
    found = implied(read)
    terms = _terms(found, list(named), weights)
    kept = _kept(found, read, weights, terms)
    sites = found.sites
    if how == "concatenate":
        scale = common_scale([t.factor for at in terms.values() for t in at])
        pairs = {name: _side_by_side(at, scale) for name, at in terms.items()}
        rows = [_exact(name, at) for name, at in terms.items()]
        dtype = dtype or _dtype_that_holds(pairs, _widest(terms))
    else:
        scale, pairs, rows = 1.0, {}, []
        ranks = PerSite("full" if r is None else r, "r")
        for name, at in terms.items():
            rank = ranks.at(sites[name])
            cuts = _cut(how, name, at, rank if isinstance(rank, int) else None, density or 1.0, seed, iterations)
            pairs[name] = as_stored(at[0].pair.host, [(c.a, c.b) for c in cuts])
            rows.append(Nearness(name, len(pairs[name][0]), sum(c.whole for c in cuts), sum(c.lost for c in cuts)))
        ranks.finish(terms)
        dtype = dtype or torch.promote_types(_widest(terms), torch.float32)
    narrow = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in pairs.items()}
    write(found.root, found.everything, narrow, kept, out, scale=scale, origin=_origin(read))
    return Approximation(Path(out), tuple(rows))


# -- what is asked for ---------------------------------------------------------------------------------------------------


def _check_settings(how: str, r: Rank | None, density: float | None, seed: int, iterations: int | None) -> None:
    if how not in HOWS:
        close = difflib.get_close_matches(str(how).lower(), HOWS, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"how: expected one of {', '.join(map(repr, HOWS))}, not {how!r}{meant}")
    dense = how not in ("concatenate", "svd")
    if how == "concatenate" and r is not None:
        raise ValueError(f"r={r!r}: a concatenation has the ranks of all together; how='svd' cuts it to a rank")
    if how != "concatenate" and r is None:
        raise ValueError(f"how={how!r} needs a rank: r=16, or r='full' to lose nothing")
    for rank in r.values() if isinstance(r, Mapping) else [r]:
        if rank is not None and rank != "full" and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ValueError(f"r: a rank is an integer of at least 1, or 'full', not {rank!r}")
    if not dense and density is not None:
        raise ValueError(f"density={density!r}: how={how!r} leaves nothing out; 'ties', 'dare' and 'dare_ties' do")
    if dense and (density is None or not 0 < density <= 1):
        raise ValueError(f"how={how!r} needs density, the share that stays, in (0, 1], not {density!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: an integer, which the same draws come of again, not {seed!r}")
    if not dense and iterations is not None:
        raise ValueError(f"iterations={iterations!r}: how={how!r} decomposes small matrices alone, and exactly")
    lowrank.check_iterations(iterations)


def _check_bases(read: Sequence[Stored]) -> None:
    for one, other in combinations(read, 2):
        wrong = disagreeing(one.base, other.base) if one.base is not None and other.base is not None else []
        if wrong:
            raise StorageError(
                f"{one.path} and {other.path} were saved from different bases: the weight of {wrong[0]!r} differs"
                f"{f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''}; a sum of changes belongs to no base then"
            )


def _origin(read: Sequence[Stored]) -> Origin:
    """What all that say something say alike."""

    def common(key: str) -> str | None:
        said = {found for stored in read if isinstance(found := stored.peft.get(key), str)}
        return said.pop() if len(said) == 1 else None

    bases = [stored.base for stored in read if stored.base is not None]
    return Origin(joined(bases) if bases else fingerprint({}), common("base_model_name_or_path"), common("task_type"))


def _terms(found: Implied, numbers: Sequence[int], weights: Sequence[float]) -> dict[str, list[Term]]:
    """By site, in the model's order."""
    terms: dict[str, list[Term]] = {}
    for site in found.everything:
        at = [
            Term(i, weight, pairs[site.name])
            for i, pairs, weight in zip(numbers, found.pairs, weights, strict=True)
            if site.name in pairs
        ]
        if at := [term for term in at if term.factor]:
            terms[site.name] = at
    if not terms:
        raise ValueError(f"weights of {list(weights)} leave no pair whose change is other than 0")
    return terms


def _kept(
    found: Implied, read: Sequence[Stored], weights: Sequence[float], terms: Mapping[str, Sequence[Term]]
) -> dict[str, InPlace]:
    """What is stored whole, where it can be taken over as it is."""
    kept: dict[str, InPlace] = {}
    whose: dict[str, Stored] = {}
    for held, stored, weight in zip(found.kept, read, weights, strict=True):
        for name, adapter in held.items():
            if weight != 1:
                raise StorageError(
                    f"{stored.path} stores {name!r} whole, which cannot be taken times {weight:g}: a sum with what the "
                    "base has there is no change of it; give that adapter the weight 1, or save one without also_train"
                )
            for other in (*kept, *terms):
                if name == other or other.startswith(f"{name}.") or name.startswith(f"{other}."):
                    first = f"{whose[other].path} stores {other!r} whole" if other in whose else f"{other!r} has a pair"
                    raise StorageError(
                        f"{stored.path} stores {name!r} whole, and {first}: one would take the place of the other; save "
                        "one without it"
                    )
            kept[name], whose[name] = adapter, stored
    return kept


# -- sums ----------------------------------------------------------------------------------------------------------------


def common_scale(factors: Sequence[float]) -> float:
    """The scale s of a concatenation: one with which all `factor / s` are powers of 2, so that B is not rounded, or 1."""
    for scale in (1.0, abs(factors[0])):
        if all(abs(math.frexp(f / scale)[0]) == 0.5 for f in factors):
            return scale
    return 1.0


def _side_by_side(terms: Sequence[Term], scale: float) -> Matrices:
    """The pairs of one site as one, `scale · BA`; B in fp64."""
    host, wide = terms[0].pair.host, any(t.pair.crosses for t in terms)
    by_term = [t.pair.matrices(wide=wide) for t in terms]
    return as_stored(host, [_stacked(terms, group, scale) for group in zip(*by_term, strict=True)])


def _stacked(terms: Sequence[Term], matrices: Sequence[Matrices], scale: float = 1.0) -> Matrices:
    b = [b * (t.factor / scale) for t, (_, b) in zip(terms, matrices, strict=True)]
    return torch.cat([a for a, _ in matrices]), torch.cat(b, dim=1)


def _exact(name: str, terms: Sequence[Term]) -> Nearness:
    groups = [_stacked(terms, group) for group in zip(*(t.pair.matrices(wide=True) for t in terms), strict=True)]
    rank = sum(len(t.pair.a) for t in terms)
    return Nearness(name, rank, sum(max(0.0, lowrank.inner(pair, pair)) for pair in groups), 0.0)


def _widest(terms: Mapping[str, Sequence[Term]]) -> torch.dtype:
    return reduce(torch.promote_types, [x.dtype for at in terms.values() for t in at for x in (t.pair.a, t.pair.b)])


def _dtype_that_holds(pairs: Mapping[str, Matrices], narrow: torch.dtype) -> torch.dtype:
    if all(torch.equal(b.to(narrow).double(), b) for _, b in pairs.values()):
        return narrow
    return torch.promote_types(narrow, torch.float32)


# -- sums cut to a rank --------------------------------------------------------------------------------------------------


def _cut(
    how: str, name: str, terms: Sequence[Term], r: int | None, density: float, seed: int, iterations: int | None
) -> list[lowrank.Truncated]:
    """The nearest pairs of rank `r` to what `how` makes of the terms, for each group of the host."""
    host, wide = terms[0].pair.host, any(t.pair.crosses for t in terms)
    each = None if r is None else _of_each_group(host, r)
    groups = list(zip(*(t.pair.matrices(wide=wide) for t in terms), strict=True))
    if how == "svd":
        return [lowrank.of_product(b, a, each) for a, b in (_stacked(terms, group) for group in groups)]
    changes = [partial(_change, how, name, term, density, seed, wide=wide) for term in terms]
    total = task_vectors.summed(changes) if how == "dare" else task_vectors.elected(changes)
    return [lowrank.of_matrix(d, each, iterations=iterations, seed=seed) for d in total.chunk(host.groups)]


def _change(how: str, name: str, term: Term, density: float, seed: int, *, wide: bool) -> Tensor:
    """`w ΔW` of one adapter after what its method leaves out: `(groups·rows) cols`."""
    change = torch.cat([b @ a for a, b in term.pair.matrices(wide=wide)]).mul_(term.pair.scale)
    if how == "ties":
        task_vectors.trimmed(change, density)
    else:
        task_vectors.dropped(change, density, seed, term.number, name)
    return change.mul_(term.weight)


def _of_each_group(host: Host, r: int) -> int:
    if r % host.groups:
        raise ValueError(f"r={r} at {host.name!r} is no multiple of its {host.groups} groups")
    return r // host.groups
