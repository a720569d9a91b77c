"""Faults planted in copies of the grouped kernels: every one must be caught by the emulator or by the numbers.

One library holds them all: FAULT asks whether this place's own number is the active one, 0 is the unharmed kernel.
"""

import shutil
from pathlib import Path

from tests.kernels_cuda.moe.emulated import PACKAGE

GEMM, EPILOGUE, TILES = "grouped_gemm_sm90.cu", "grouped_epilogue.cuh", "grouped_tiles.cuh"

# name: (file, the right text, the text with the fault in it)
FAULTS = {
    "gate and up loaded in each other's place": (
        GEMM,
        "2 * tile.expert + box / 2",
        "2 * tile.expert + (FAULT ? 1 - box / 2 : box / 2)",
    ),
    "the weights of expert 0 for everybody": (GEMM, "k, tile.expert)", "k, FAULT ? 0 : tile.expert)"),
    "no wait for the last product": (GEMM, "wgmma_wait<0>();", "if (!FAULT) wgmma_wait<0>();"),
    "a stage given back one product early": (
        GEMM,
        "wgmma_wait<1>();",
        "if (FAULT) wgmma_wait<2>(); else wgmma_wait<1>();",
    ),
    "stages never given back": (TILES, "if (lane == 0) barrier", "if (lane == 0 && !FAULT) barrier"),
    "the loader does not wait for free stages": (
        GEMM,
        "barrier_wait(ring.empty(), ring.parity ^ 1);",
        "if (!FAULT) barrier_wait(ring.empty(), ring.parity ^ 1);",
    ),
    "the loader waits for the other phase": (GEMM, "ring.parity ^ 1)", "ring.parity ^ (FAULT ? 0 : 1))"),
    "bytes of one box not awaited": (
        GEMM,
        "kTileBytes : kStageBytes;",
        "kTileBytes : kStageBytes - (FAULT ? kTileBytes : 0);",
    ),
    "full stages not awaited": (
        GEMM,
        "    barrier_wait(ring.full(), ring.parity);\n    if constexpr",
        "    if (!FAULT) barrier_wait(ring.full(), ring.parity);\n    if constexpr",
    ),
    "no fence before the products": (GEMM, "wgmma_fence();", "if (!FAULT) wgmma_fence();"),
    "no tile announced": (
        GEMM,
        "  store_pair16(there.tile(), {",
        "  if (!FAULT) store_pair16(there.tile(), {",
    ),
    "a tile taken twice": (
        GEMM,
        "index = uniform(next);",
        "index = uniform(next) - FAULT;",
    ),
    "the first tile left out": (
        GEMM,
        "int index = uniform(speaks() ? take_ticket(taken) : 0);",
        "int index = uniform(speaks() ? take_ticket(taken) : 0) + FAULT;",
    ),
    "short tiles start where whole ones do": (
        TILES,
        "Place{cut.stacked, 2 * index}",
        "Place{FAULT ? 0 : cut.stacked, 2 * index}",
    ),
    "short tiles start where those side by side do": (
        TILES,
        "short_ones_ ? cut.beside * kTileHeight",
        "short_ones_ && !FAULT ? cut.beside * kTileHeight",
    ),
    "the counter of an earlier launch": (
        GEMM,
        "zero_device_memory(p.call.group.taken_tiles, 2 * sizeof(int32_t),",
        "zero_device_memory(p.call.group.taken_tiles, FAULT ? 4 : 2 * sizeof(int32_t),",
    ),
    "the lower half of a whole tile not loaded": (
        GEMM,
        "tile.num_rows <= 64;",
        "tile.num_rows <= (FAULT ? 128 : 64);",
    ),
    "an empty gradient never told of": (
        GEMM,
        "(depth > 0 ? bytes : 0)",
        "(depth > 0 || FAULT ? bytes : 0)",
    ),
    "a gradient's box reused too early": (
        EPILOGUE,
        "tma_store_wait_read<1>();",
        "{ if (!FAULT) tma_store_wait_read<1>(); }",
    ),
    "a gradient written instead of added": (
        EPILOGUE,
        "tma_add_3d(map, box, column,",
        "(FAULT ? tma_store_3d : tma_add_3d)(map, box, column,",
    ),
    "a gradient's box not fenced": (
        EPILOGUE,
        "fence_async_proxy();",
        "if (!FAULT) fence_async_proxy();",
    ),
    "the block ends before its gradients are read": (
        GEMM,
        "lane == 0) tma_store_wait_read<0>();",
        "lane == 0 && !FAULT) tma_store_wait_read<0>();",
    ),
    "both warpgroups read the upper half": (GEMM, "half * kTileBytes", "(FAULT ? 0 : half) * kTileBytes"),
    "descriptor steps of the other layout": (
        GEMM,
        "kRight ? n_major(ring.right(), step)",
        "(kRight && !FAULT) ? n_major(ring.right(), step)",
    ),
    "one row of the next expert in the depth": (
        GEMM,
        "zero_rows_from(ring, depth - k,",
        "zero_rows_from(ring, depth - k + (FAULT ? 1 : 0),",
    ),
    "zeros not published to the tensor cores": (
        GEMM,
        "fence_async_proxy();",
        "if (!FAULT) fence_async_proxy();",
    ),
    "the other warpgroup's zeros not awaited": (
        GEMM,
        "sync_named(1, 256);",
        "if (!FAULT) sync_named(1, 256);",
    ),
    "one row too many stored": (
        EPILOGUE,
        "row < mine.num_rows && unit",
        "row < mine.num_rows + (FAULT ? 1 : 0) && unit",
    ),
    "columns beyond the matrix stored": (
        EPILOGUE,
        "unit * 8 < columns",
        "unit * 8 < columns + (FAULT ? 8 : 0)",
    ),
    "wrong lane map of the staging": (EPILOGUE, "8 * (matrix & 1)", "8 * (FAULT ? matrix / 2 : matrix & 1)"),
    "row weights of the other half": (
        EPILOGUE,
        "weights.of_half[i % 2]",
        "weights.of_half[FAULT ? 1 - i % 2 : i % 2]",
    ),
    "the derivative of the sigmoid forgotten": (
        EPILOGUE,
        "(slope + silu * (1.0f - slope))",
        "(slope + (FAULT ? 0.0f : silu * (1.0f - slope)))",
    ),
    "hidden gate and up in each other's place": (
        GEMM,
        "box / kLeftBoxes);",
        "FAULT ? 1 - box / kLeftBoxes : box / kLeftBoxes);",
    ),
    "hidden of the upper half for both": (
        EPILOGUE,
        "warp / 4 * kTileBytes",
        "(FAULT ? 0 : warp / 4) * kTileBytes",
    ),
    "hidden not awaited": (
        EPILOGUE,
        "if (pass % kPassesPerStage == 0) barrier",
        "if (pass % kPassesPerStage == 0 && !FAULT) barrier",
    ),
    "hidden given back before it is read": (
        EPILOGUE,
        "== kPassesPerStage - 1)",
        "== (FAULT ? 0 : kPassesPerStage - 1))",
    ),
    "hidden left in the ring by a skipped tile": (
        GEMM,
        "? kHiddenStages * kTileDepth",
        "? (kHiddenStages - FAULT) * kTileDepth",
    ),
    "shares of four lanes in one place": (
        EPILOGUE,
        "+ mine.lane % 4] = load",
        "+ (FAULT ? 0 : mine.lane % 4)] = load",
    ),
    "an expert's stacked pairs skipped": (
        TILES,
        ": cut.stacked * column_tiles_ +",
        ": (FAULT ? 0 : cut.stacked) * column_tiles_ +",
    ),
    "an expert's tiles side by side skipped": (
        TILES,
        "+ cut.beside * twos",
        "+ (FAULT ? 0 : cut.beside) * twos",
    ),
    "second row of pairs skipped": (
        TILES,
        "{first_row + rest % rows,",
        "{first_row + (FAULT ? 0 : rest % rows),",
    ),
    "second column of two skipped": (TILES, "column + rest / rows}", "column + (FAULT ? 0 : rest / rows)}"),
    "an odd last column taken for two": (
        TILES,
        "(column + 1 < column_tiles ? 2 : 1)",
        "(column + 1 < column_tiles || FAULT ? 2 : 1)",
    ),
    "an expert's rows start one early": (
        TILES,
        "first_row_ += num_rows_;",
        "first_row_ += num_rows_ - (FAULT && num_rows_ > 0);",
    ),
    "the other block's memory used before it runs": (
        GEMM,
        "sync_pair();\n  if",
        "if (FAULT) sync_block(); else sync_pair();\n  if",
    ),
    "the block that loads ends before the other is done": (
        GEMM,
        "sync_pair();\n}",
        "if (!FAULT) sync_pair();\n}",
    ),
    "every lane of the loading warp speaks": (
        GEMM,
        "if (speaks()) {",
        "if (speaks() || FAULT) {",
    ),
    "the ring behind hidden forgotten": (
        GEMM,
        "stage < kHiddenStages; ++stage) ring.advance();",
        "stage < kHiddenStages - FAULT; ++stage) ring.advance();",
    ),
    "the other block's stage expects nothing": (
        GEMM,
        "barrier_expect_pair(ring",
        "if (!FAULT) barrier_expect_pair(ring",
    ),
    "the words of a tile not awaited": (
        GEMM,
        "(k == 0 ? kTileWordsBytes : 0)",
        "(k == 0 && !FAULT ? kTileWordsBytes : 0)",
    ),
    "the words of a tile told to the wrong block": (
        GEMM,
        "tile.num_rows), 0},\n                 there.full()",
        "tile.num_rows), 0},\n                 FAULT ? ring.full() : there.full()",
    ),
    "the second block gives nothing back": (
        TILES,
        "void release_stage(const Ring& ring, int lane) {",
        "void release_stage(const Ring& ring, int lane) { if (FAULT && rank_in_pair() == 1) return;",
    ),
    "stages given back to the block that does not load": (
        TILES,
        "ring.in(0).empty()",
        "ring.in(FAULT ? rank_in_pair() : 0).empty()",
    ),
    "a stage free when half its readers are done": (
        TILES,
        "2 * kWarpsThatMultiply",
        "(FAULT ? 1 : 2) * kWarpsThatMultiply",
    ),
    "shared rows sent to one block only": (
        GEMM,
        "load_left<kUse>(p, pair.first, ring, k, kBoth)",
        "load_left<kUse>(p, pair.first, ring, k, FAULT ? 1 : kBoth)",
    ),
    "shared columns sent to one block only": (
        GEMM,
        "load_right<kUse>(p, pair.first, ring, k, kBoth)",
        "load_right<kUse>(p, pair.first, ring, k, FAULT ? 1 : kBoth)",
    ),
    "own boxes sent to the other block": (
        GEMM,
        "ring, k, 1 << rank)",
        "ring, k, 1 << (FAULT ? 1 - rank : rank))",
    ),
    "both blocks work on the upper tile's rows": (
        GEMM,
        "tile.first_row += rank *",
        "tile.first_row += FAULT ? 0 : rank *",
    ),
    "both blocks work on the left tile's columns": (
        GEMM,
        "tile.left += rank *",
        "tile.left += FAULT ? 0 : rank *",
    ),
    "a tile outside its matrix not skipped": (
        GEMM,
        "|| tile.left >= p.columns",
        "|| (tile.left >= p.columns && !FAULT)",
    ),
}


def plant_faults(target: Path) -> Path:
    """Copy the kernels below target with every fault planted behind its number; returns the copy's root."""
    root = target / "kernels_cuda"
    for folder in ("moe", "csrc"):
        shutil.copytree(PACKAGE / folder, root / folder)
    for number, (file, right, faulty) in enumerate(FAULTS.values(), start=1):
        path = root / "moe" / file
        text = path.read_text()
        assert right in text, f"fault {number} expects {right!r} in {file}"
        path.write_text(text.replace(right, faulty.replace("FAULT", f"(m1_fault == {number})")))
    primitives = root / "csrc" / "primitives.h"
    switch = '#pragma once\nextern "C" { inline volatile int m1_fault = 0; }\n'
    primitives.write_text(primitives.read_text().replace("#pragma once\n", switch, 1))
    return root
