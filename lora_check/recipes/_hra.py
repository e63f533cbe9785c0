"""X H for rows X and H = (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T), and how far off a producer may be.

With Q_j the product of the reflections after the j-th and z_j = 2 Q_j^T u_j, H = I - U Z^T; with H_j that of the first
j and y_j = 2 H_j-1 u_j, H_j = I - Y U^T. A producer may form H first, reflection by reflection, or reflect X. Each step
computes H_j = H_j-1 (I - 2 u_j u_j^T) + a u_j^T + E, where elementwise, for a row x,

    |x a| <= 2 gamma(n + 4, u) |x| (|u_j| + h_j-1 + N_j-1) + gamma(n + 4, u) |x y_j| + 3 |w_j| s_j |x|_2
    |x E| <= (8 u |u_j| + 4 w_j) s_j |x|_2 + u |x H_j|

for the sums of n products, for the norm that u_j was divided by, and for each rounding. h_j are the lengths of the
columns, or rows, of H_j - I: sqrt(2 - 2 diag H_j), as H_j is orthogonal. N_j is how far it is off in norm, w_j the
radius of u_j, and s_j = 1 + |h_j-1|_2 + N_j-1. The first error reaches the result as a multiple of u_j^T Q_j =
z_j^T / 2, the second through |Q_j|; and |x H_j| <= |x| + |x|_2 (h_j + N_j). (Higham, ASNA, section 19.3, has the same
by norms alone.)

An adapter kept in 16 bits makes H out of 16-bit numbers, too coarse for any bound: it is replayed as PEFT makes it.
"""

from __future__ import annotations

from typing import Any

from lora_check.types import Factors, Numbers


def reflections(columns: Numbers) -> Factors:
    """U, Z and, for balls, what bounds the error; H itself where it is made in 16 bits.   columns (n, r), not yet U"""
    import torch

    from lora_check.ball import Ball
    from lora_check.functions import middle

    c = middle(columns)
    u = c / c.norm(dim=0)
    if u.itemsize < 4:
        whole = torch.eye(len(u), dtype=u.dtype)
        for own in u.T:
            whole = whole - 2 * whole @ own[:, None] @ own[None]
        return {"whole": whole}
    z = torch.zeros_like(u)
    for j in reversed(range(int(u.shape[1]))):
        z[:, j] = 2 * (u[:, j] - z[:, j + 1 :] @ (u[:, j + 1 :].T @ u[:, j]))
    return {"u": u, "z": z, **(_errors(columns, u, z) if isinstance(columns, Ball) else {})}


def reflected(x: Numbers, made: Factors) -> Numbers:
    """X H."""
    from lora_check.ball import Ball

    if "whole" in made:
        return x @ made["whole"]
    u, z = made["u"], made["z"]
    if not isinstance(x, Ball):
        return x - (x @ u) @ z.T
    length, blur = x.bound.norm(dim=1, keepdim=True), x.rad.norm(dim=1, keepdim=True)
    sums = 2 * (x.bound @ made["reach"] + length * made["error"]) + (x.mid @ made["y"]).abs() + length * x.u
    along = (made["gamma"] * sums) @ z.abs().T / 2
    spread = along + length * made["off"] + made["own"] * x.bound + x.rad + blur * made["turned"]
    return x.made(x.mid - (x.mid @ u) @ z.T, spread)


def _errors(columns: Any, u: Any, z: Any) -> Factors:
    """The parts of the bound: `gamma` times `reach`, `error` and `y` along z, `off` by length, `own` by element."""
    import torch

    from lora_check.ball import OWN
    from lora_check.rounding import gamma

    (n, count), unit = u.shape, columns.u + OWN
    sums, blurs = gamma(n + 4, unit), columns.rad.norm(dim=0)
    w = (columns.rad + u.abs() * blurs) / (columns.mid.norm(dim=0) - blurs).clamp_min(0)
    y = _forward(u)
    before, after = _lengths(y, u), _lengths(z.flip(1), u.flip(1)).flip(0)
    off, error, errors = torch.zeros(n, dtype=torch.float64), 0.0, []
    for j in range(int(count)):
        errors.append(error)
        vague, s = w[:, j].norm(), 1 + before[j].norm() + error
        beside = (8 * unit + 4 * vague) * s
        error = float((error + 4 * sums * s + 3 * vague * s + beside + unit * n**0.5) / (1 - unit))
        own = s * (8 * unit * u[:, j].abs() + 4 * w[:, j]) + unit * (before[j + 1] + error)
        through = (beside + unit * (1 + before[j + 1].norm() + error)) * after[j + 1]
        off = off + 3 * vague * s * z[:, j].abs() / 2 + own + through
    turned = before[count] + error
    made = {
        "gamma": sums,
        "reach": u.abs() + before[:count].T,
        "error": torch.tensor(errors, dtype=torch.float64),
        "y": y,
    }
    return made | {"off": off + gamma(n, unit) * turned, "own": gamma(n, unit) + (count + 1) * unit, "turned": turned}


def _forward(u: Any) -> Any:
    """Y with H_j = I - Y_1..j U_1..j^T for every j."""
    import torch

    y = torch.zeros_like(u)
    for j in range(int(u.shape[1])):
        y[:, j] = 2 * (u[:, j] - y[:, :j] @ (u[:, :j].T @ u[:, j]))
    return y


def _lengths(left: Any, right: Any) -> Any:
    """The lengths of the columns of left right^T, (r + 1, n), of 0 to r columns of both; I less that is orthogonal."""
    import torch

    from lora_check.ball import OWN

    n, count = left.shape
    squares = torch.cat([torch.zeros(1, n, dtype=torch.float64), 2 * (left * right).cumsum(1).T])
    return (squares.clamp_min(0) + 8 * n * count * OWN).sqrt()


def mirror(columns: Numbers) -> Factors:
    """Q, the columns made orthogonal one after the other and of length 1, and for balls what bounds the error.

    With columns a_i of length 1 the loop leaves A + D = Q R and Q^T Q = I + M. A share that is off by g = gamma(n + 4,
    u) of the length moves along q_j, into R alone; what is left of D are roundings, |D_i| <= (i + 1) u (|a_i| + |Q|
    |R_i|). What q_j still has of a column when it was taken off, less what the columns between brought back, is the
    strict upper triangle of M times R: at most g (1 + |R_ji|) + (i - j + 1) u. To first order Q Q^T is off by Q M Q^T
    and by L Q^T + Q L^T, L = (I - Q Q^T) D R^-1, and beyond that by less than 8 (|M| + |L|)^2 in norm. (Bjorck,
    "Solving linear least squares problems by Gram-Schmidt orthogonalization", BIT 7, 1967.) Columns too near to one
    another for that are known to have the length 1, no more.
    """
    from lora_check.ball import Ball

    return _bounded_mirror(columns) if isinstance(columns, Ball) else {"q": _orthogonal(columns)}


def mirrored(x: Numbers, made: Factors) -> Numbers:
    """X (I - 2 Q Q^T); H made first is a sum of r products, its product with X one of n."""
    import torch

    from lora_check.ball import Ball
    from lora_check.rounding import gamma

    q = made["q"]
    if not isinstance(x, Ball):
        return x @ (torch.eye(len(q), dtype=q.dtype) - 2 * q @ q.T) if q.itemsize < 4 else x - (x @ q) * 2 @ q.T
    inside, length, rows = x.mid @ q, x.bound.norm(dim=1, keepdim=True), q.norm(dim=1)
    share = inside.norm(dim=1, keepdim=True) + x.rad.norm(dim=1, keepdim=True)
    off = (share * made["twist"] + length * made["lean"]) * rows + share * made["tilt"] + length * made["rest"]
    whole = x.bound + 2 * (x.bound @ q.abs()) @ q.abs().T
    sums, blur = gamma(int(q.shape[0] + q.shape[1]) + 4, x.u), x.rad + 2 * x.rad.norm(dim=1, keepdim=True) * rows
    spread = 2 * off + sums * whole + blur
    return x.made(x.mid - inside * 2 @ q.T, spread)


def _orthogonal(columns: Any) -> Any:
    """Each column less its shares of the ones before, taken off one by one, divided by its norm."""
    import torch

    basis: list[Any] = []
    for own in columns.T[..., None]:
        for one in basis:
            own = own - (one.T @ own) * one
        basis.append(own / own.norm())
    return torch.cat(basis, 1)


def _bounded_mirror(columns: Any) -> Factors:
    """Q with |M| as `twist`, |L| as `lean` and the lengths of its rows as `tilt`, and `rest`."""
    import torch

    from lora_check.ball import OWN
    from lora_check.rounding import gamma

    (n, count), unit = columns.mid.shape, columns.u + OWN
    sums, lengths = gamma(n + 4, unit), columns.mid.norm(dim=0)
    a = columns.mid / lengths
    q, upper = torch.linalg.qr(a)
    inverse, index = torch.linalg.inv_ex(upper).inverse.abs(), torch.arange(count)
    d = columns.rad / lengths + (index + 1) * unit * (a.abs() + q.abs() @ upper.abs())
    left = ((1 + upper.abs()) * sums + (index - index[:, None] + 1) * unit).triu(1) @ inverse
    twist, lean = (2 * left.square().sum() + count * sums**2).sqrt(), d @ inverse
    size, made = twist + lean.norm(), {"q": q}
    if not size < 1 / 16:
        return made | {"twist": 0.0, "lean": 0.0, "tilt": torch.zeros(n, dtype=torch.float64), "rest": count + 2.0}
    tilt = lean.norm(dim=1) + q.norm(dim=1) * lean.norm()
    grown = {"twist": twist, "lean": lean.norm(), "tilt": tilt}
    return made | {part: value * 9 / 8 for part, value in grown.items()} | {"rest": 8 * size.square()}
