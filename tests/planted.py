"""Kernels with a known fault each, and the same without it: what tests/compiled.py must tell apart.

The names say which: tests/test_compile.py reads "planted: <the fault that must be named>"."""

from kernels.launch import jit, tl


@jit
def multiply(a_ptr, b_ptr, c_ptr, N,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """c (BLOCK_M, BLOCK_N) = a (BLOCK_M, N) b (N, BLOCK_N)."""
    offs_m, offs_n, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, N, BLOCK_K):
        a = tl.load(a_ptr + offs_m[:, None] * N + k + offs_k[None, :])
        b = tl.load(b_ptr + (k + offs_k)[:, None] * BLOCK_N + offs_n[None, :])
        c = tl.dot(a, b, c)
    tl.store(c_ptr + offs_m[:, None] * BLOCK_N + offs_n[None, :], c)


@jit
def multiply_by_hand(a_ptr, b_ptr, c_ptr, N,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same without tl.dot, one column of a and one row of b at a time."""
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, N):
        a = tl.load(a_ptr + k * BLOCK_M + offs_m).to(tl.float32)
        b = tl.load(b_ptr + k * BLOCK_N + offs_n).to(tl.float32)
        c += a[:, None] * b[None, :]
    tl.store(c_ptr + offs_m[:, None] * BLOCK_N + offs_n[None, :], c)


@jit
def copy_rows(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    """y row = x row; x's rows are `stride` apart."""
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + offs)
    tl.store(y_ptr + row * BLOCK + offs, x)


@jit
def add_unknown(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    """Not a program: Triton has no such function."""
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.no_such_function(x_ptr, stride))


def product(name, tile, warps, stages, kernel=multiply):
    sizes = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile))
    return {"name": name, "kernel": kernel, "constexprs": sizes, "num_warps": warps,
            "signature": {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "N": "i32"},
            "divisible": {"a_ptr", "b_ptr", "c_ptr", "N"}, "num_stages": stages, "dot": True}


def copied(name, divisible, kernel=copy_rows):
    return {"name": name, "kernel": kernel, "constexprs": {"BLOCK": 4096},
            "signature": {"x_ptr": "*bf16", "y_ptr": "*bf16", "stride": "i32"},
            "divisible": divisible, "num_warps": 8, "num_stages": 3, "dot": False}


def compile_cases():
    return [product("sound: product", (128, 128, 64), 8, 3),
            product("sound: two warps", (32, 64, 64), 2, 3),        # mma.sync on sm_90 as well
            # 128 x 256 sums in fp32 are 256 registers a thread, and 255 is all there are
            product("planted: spills in the loop", (128, 256, 32), 4, 2),
            product("planted: shared memory", (128, 256, 64), 8, 6),
            product("planted: no H", (64, 64, 64), 4, 3, multiply_by_hand),
            # four warps could run wgmma, 32 rows cannot: on sm_90 a case must say so
            product("planted: no HGMMA", (32, 64, 64), 4, 3),
            {**product("sound: says that it has few rows", (32, 64, 64), 4, 3), "dot": "HMMA"},
            copied("sound: copy", {"x_ptr", "y_ptr", "stride"}),
            # nothing promised of the row stride: every load is two bytes, 8 times the requests
            copied("planted: narrow loads", {"x_ptr", "y_ptr"}),
            copied("planted: does not compile", {"x_ptr", "y_ptr"}, add_unknown)]
