// Packing and unpacking for one instruction set; CPU_CAPABILITY is its name (DEFAULT, AVX2, AVX512).
#include "packed_kernels.h"

#include "chunks.h"

namespace {

using trl_fast::kPackedChunk;
using trl_fast::kPackedHeader;
using trl_fast::PackArgs;

constexpr float kLowest = 65534.0f;  // steps; what lies further down is brought up to here
constexpr float kMinusInf = 65535.0f;

// Rounds steps below the largest logit to their code. No -inf but where the chunk has nothing else gives NaN here.
inline Vec code_of(Vec steps) {
  const Vec far = steps < splat(kInf) ? splat(kLowest) : splat(kMinusInf);
  return (steps < splat(kLowest) ? steps : far) + splat(0.5f);
}

void pack_chunk(const float* logits, int64_t n, float inverse_step, uint16_t* packed) {
  alignas(64) float u[kPackedChunk];
  widen_chunk(logits, n, -kInf, u);
  Vec largest[2] = {splat(-kInf), splat(-kInf)};
  for (int64_t i = 0, k = 0; i < n; i += kWidth, k ^= 1) largest[k] = maximum(load(u + i), largest[k]);
  const float top = max_of(maximum(largest[0], largest[1]));
  std::memcpy(packed, &top, sizeof(top));
  packed += kPackedHeader;
  const Vec top_vec = splat(top), factor = splat(inverse_step);
  const int64_t whole = n / kWidth * kWidth;
  HVec last = {};
  for (int64_t i = 0; i < n; i += kWidth) {
    const IVec code = __builtin_convertvector(code_of((top_vec - load(u + i)) * factor), IVec);
    const HVec narrow = __builtin_convertvector(bits_as<UVec>(code), HVec);
    if (i < whole) {
      std::memcpy(packed + i, &narrow, sizeof(narrow));
    } else {
      last = narrow;
    }
  }
  std::memcpy(packed + whole, &last, (n - whole) * sizeof(uint16_t));
}

inline Vec unpack_vec(HVec codes, Vec top, Vec step) {
  const Vec code = __builtin_convertvector(bits_as<IVec>(__builtin_convertvector(codes, UVec)), Vec);
  return code == splat(kMinusInf) ? splat(-kInf) : top - code * step;
}

void unpack_chunk(const uint16_t* packed, int64_t n, float step, float* logits) {
  float top;
  std::memcpy(&top, packed, sizeof(top));
  packed += kPackedHeader;
  const Vec top_vec = splat(top), step_vec = splat(step);
  const int64_t whole = n / kWidth * kWidth;
  HVec codes = {};
  for (int64_t i = 0; i < whole; i += kWidth) {
    std::memcpy(&codes, packed + i, sizeof(codes));
    store(logits + i, unpack_vec(codes, top_vec, step_vec));
  }
  if (whole == n) return;
  std::memcpy(&codes, packed + whole, (n - whole) * sizeof(uint16_t));
  const Vec last = unpack_vec(codes, top_vec, step_vec);
  std::memcpy(logits + whole, &last, (n - whole) * sizeof(float));
}

void pack(const PackArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* logits = args.logits + row * args.logits_stride;
    uint16_t* packed = args.packed + row * args.packed_stride;
    for (int64_t start = 0; start < args.columns; start += kPackedChunk, packed += kPackedHeader + kPackedChunk) {
      pack_chunk(logits + start, std::min(kPackedChunk, args.columns - start), 1.0f / args.step, packed);
    }
  }
}

void unpack(const PackArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float* logits = args.logits + row * args.logits_stride;
    const uint16_t* packed = args.packed + (args.index ? args.index[row] : row) * args.packed_stride;
    for (int64_t start = 0; start < args.columns; start += kPackedChunk, packed += kPackedHeader + kPackedChunk) {
      unpack_chunk(packed, std::min(kPackedChunk, args.columns - start), args.step, logits + start);
    }
  }
}

}  // namespace

namespace trl_fast {

extern const PackedKernels TRL_FAST_JOIN(kPackedKernels, CPU_CAPABILITY);
const PackedKernels TRL_FAST_JOIN(kPackedKernels, CPU_CAPABILITY) = {pack, unpack};

}  // namespace trl_fast
