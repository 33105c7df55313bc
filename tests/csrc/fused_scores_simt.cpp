// The scoring of tiles and the merging of their parts as a host library with C functions, for
// test_cuda_fused_scores.py.
#include "support/simt_tile_scores.h"

extern "C" {

// What the test's own structures have to be as large as.
void simt_fused_bytes(int64_t* bytes) {
  bytes[0] = sizeof(trl_fast::TileScoreArgs);
  bytes[1] = sizeof(trl_fast::MergeArgs);
}

void simt_fused_scores(const trl_fast::TileScoreArgs* args, const float* products, int64_t stride, unsigned seed) {
  trl_fast::run_tiles(*args, products, stride, seed);
}

void simt_merge_parts(const trl_fast::MergeArgs* args, unsigned seed) { trl_fast::run_merge(*args, seed); }
}
