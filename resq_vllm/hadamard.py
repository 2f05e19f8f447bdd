"""Hadamard matrices of the orders that FFN widths need, made on demand: Paley I, Paley II and Kronecker products.

A width f = G·k·2^m is transformed block by block (G blocks) with H_k ⊗ H_{2^m} / sqrt(k·2^m). k is the smallest order
that carries the odd factor of the block: 14336/8 = 28·64, 11008/8 = 344·4, 18944/8 = 148·16. No matrix tables are
shipped: prime fields and their small extensions (25, 49, 343) give every order that current models use.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch

from resq_vllm.errors import ResQError

# The largest H_k that is multiplied as a dense matrix. 924 (FFN 29568 of Qwen2.5-72B) is the largest in use.
MAX_DENSE_ORDER = 2048


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p**e and p prime, or None."""
    for p in range(2, q + 1):
        if q % p == 0:
            e, rest = 0, q
            while rest % p == 0:
                rest //= p
                e += 1
            return (p, e) if rest == 1 else None
    return None


def _field_products(p: int, e: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The elements of GF(p^e) as coefficient tuples (constant first), and the square of each element."""
    elements = [tuple(reversed(c)) for c in product(range(p), repeat=e)]
    if e == 1:
        return elements, [((x[0] * x[0]) % p,) for x in elements]
    # A monic polynomial of degree 2 or 3 without a root is irreducible; every order in use has e <= 3.
    modulus = next(
        c for c in product(range(p), repeat=e) if all((x**e + sum(c[i] * x**i for i in range(e))) % p for x in range(p))
    )

    def square(a: tuple[int, ...]) -> tuple[int, ...]:
        full = [0] * (2 * e - 1)
        for i, j in product(range(e), repeat=2):
            full[i + j] += a[i] * a[j]
        for top in range(2 * e - 2, e - 1, -1):
            for i in range(e):
                full[top - e + i] -= full[top] * modulus[i]
            full[top] = 0
        return tuple(v % p for v in full[:e])

    return elements, [square(a) for a in elements]


def _jacobsthal(q: int, p: int, e: int) -> torch.Tensor:
    """Q[i, j] = χ(a_i − a_j): +1 for a non-zero square of GF(q), −1 for a non-square, 0 on the diagonal."""
    elements, squares = _field_products(p, e)
    index = {a: i for i, a in enumerate(elements)}
    character = -torch.ones(q, dtype=torch.int8)
    character[[index[s] for s in squares]] = 1
    character[0] = 0
    digits = torch.tensor(elements)
    difference = (digits[:, None, :] - digits[None, :, :]) % p
    weights = torch.tensor([p**i for i in range(e)])
    order = torch.tensor([int((torch.tensor(a) * weights).sum()) for a in elements])
    position = torch.empty(q, dtype=torch.long)
    position[order] = torch.arange(q)
    return character[position[(difference * weights).sum(-1)]]


def _paley_one(q: int, p: int, e: int) -> torch.Tensor:
    skew = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = _jacobsthal(q, p, e)
    return skew + torch.eye(q + 1, dtype=torch.int8)


def _paley_two(q: int, p: int, e: int) -> torch.Tensor:
    conference = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    conference[0, 1:], conference[1:, 0] = 1, 1
    conference[1:, 1:] = _jacobsthal(q, p, e)
    off = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, off) + torch.kron(torch.eye(q + 1, dtype=torch.int8), diagonal)


def _construct(k: int) -> torch.Tensor | None:
    if k == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if k == 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    if k % 4:
        return None
    if (k - 1) % 4 == 3 and (field := _prime_power(k - 1)) and field[1] <= 3:
        return _paley_one(k - 1, *field)
    q = k // 2 - 1
    if q % 4 == 1 and (field := _prime_power(q)) and field[1] <= 3:
        return _paley_two(q, *field)
    half = _construct(k // 2)
    return None if half is None else torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), half)


@lru_cache(maxsize=64)
def hadamard_matrix(k: int) -> torch.Tensor:
    """H_k, int8 [k, k] with entries ±1 and H·Hᵀ = k·I; the same for every process and version of format 1.

    Raises ResQError when no construction here gives that order.
    """
    matrix = _construct(k) if k <= MAX_DENSE_ORDER else None
    if matrix is None:
        raise ResQError(f"no Hadamard matrix of order {k} is known here; choose another number of hadamard groups")
    return matrix


@lru_cache(maxsize=256)
def hadamard_order(n: int) -> int:
    """The k of n = k·2^m: 1 for a power of two, else the smallest order that holds the odd factor of n.

    Raises ResQError when no such order exists.
    """
    odd = n
    while odd % 2 == 0 and odd:
        odd //= 2
    if odd == 1:
        return 1
    k = odd * 4
    while k <= min(n, MAX_DENSE_ORDER) and n % k == 0:
        if _construct(k) is not None:
            return k
        k *= 2
    raise ResQError(
        f"no Hadamard matrix of order {n} = {odd}·{n // odd} is known here; choose another number of groups"
    )


def sylvester(n: int) -> torch.Tensor:
    """H_{2^m} in Sylvester order, float64 [n, n], entries ±1."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.kron(step, matrix)
    return matrix


def block_matrix(n: int) -> torch.Tensor:
    """One orthonormal block (H_k ⊗ H_{2^m})/sqrt(n), float64 [n, n]: the definition that fast transforms must equal."""
    k = hadamard_order(n)
    return torch.kron(hadamard_matrix(k).double(), sylvester(n // k)) / n**0.5
