// The sparse kernels of one instruction set; CPU_CAPABILITY is its name (DEFAULT, AVX2, AVX512).
#include "sparse_kernels.h"

#include "row_chunks.h"

namespace {

using trl_fast::Dtype;
using trl_fast::ProductArgs;
using trl_fast::SampleArgs;

// A row's entries so far. `carry` in [0, threshold) is the probability passed since the last small entry that was
// kept.
struct Sampler {
  double threshold, carry;
  int32_t* columns;
  float* logprobs;
  int64_t capacity;
  int64_t count = 0;

  void keep(int64_t column, float logprob) {
    if (count < capacity) {
      columns[count] = static_cast<int32_t>(column);
      logprobs[count] = logprob;
    }
    count += count <= capacity;
  }

  // Adds small probabilities that sum to so much, unless one of them has to be kept.
  bool pass(double sum) {
    if (!(carry + sum < threshold)) return false;
    carry += sum;
    return true;
  }

  void visit(int64_t column, float logprob, float p) {
    if (p >= threshold) return keep(column, logprob);
    carry += p;
    if (!(carry >= threshold)) return;
    carry -= threshold;
    keep(column, logprob);
  }
};

// Vectors that are looked at together: most keep nothing, and are summed as a whole.
constexpr int64_t kTogether = 4;
static_assert(kChunk % (kTogether * kWidth) == 0);

// Chunk of log-probabilities of columns [start, start + n), padded with -inf to whole vectors.
void sample_chunk(const float* logprobs, int64_t start, int64_t n, Sampler& sampler) {
  for (int64_t first = 0; first < n; first += kTogether * kWidth) {
    const int64_t vectors = std::min(kTogether, (n - first + kWidth - 1) / kWidth);
    Vec p[kTogether], total = {};
    for (int64_t v = 0; v < vectors; ++v) {
      p[v] = exp_vec(load(logprobs + first + v * kWidth));
      total += p[v];
    }
    if (sampler.pass(sum_of(total))) continue;
    for (int64_t v = 0; v < vectors; ++v) {
      if (sampler.pass(sum_of(p[v]))) continue;
      const int64_t column = first + v * kWidth, lanes = std::min<int64_t>(kWidth, n - column);
      for (int64_t k = 0; k < lanes; ++k) sampler.visit(start + column + k, logprobs[column + k], p[v][k]);
    }
  }
}

template <typename T>
int64_t sample_row(const SampleArgs& args, int64_t row, Sampler sampler) {
  alignas(64) float u[kChunk];
  const Vec lse = splat(args.lse[row]);
  const T* tile = static_cast<const T*>(args.logits) + row * args.row_stride;
  for (int64_t first = 0; first < args.vocab_size; first += args.width, tile += args.tile_stride) {
    trl_fast::Transform transform = args.transform;
    if (transform.bias) transform.bias += first;
    const int64_t columns = std::min(args.width, args.vocab_size - first);
    for (int64_t start = 0; start < columns; start += kChunk) {
      const int64_t n = std::min(kChunk, columns - start);
      logits_chunk(tile, transform, start, n, u);
      for (int64_t i = 0; i < n; i += kWidth) store(u + i, load(u + i) - lse);
      sample_chunk(u, first + start, n, sampler);
    }
  }
  return sampler.count;
}

int64_t sample(const SampleArgs& args, int64_t row, int32_t* columns, float* logprobs, int64_t capacity) {
  const Sampler sampler = {args.threshold, args.offsets[row] * args.threshold, columns, logprobs, capacity};
  switch (args.dtype) {
    case Dtype::kFloat32:
      return sample_row<float>(args, row, sampler);
    case Dtype::kBFloat16:
      return sample_row<BFloat16>(args, row, sampler);
    case Dtype::kFloat16:
      return sample_row<Float16>(args, row, sampler);
  }
  return 0;
}

template <typename T>
void add_row(const T* row, float value, int64_t width, float* sum) {
  const Vec factor = splat(value);
  const int64_t whole = width / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) store(sum + i, load(sum + i) + factor * widen(row + i));
  if (whole == width) return;
  T last[kWidth] = {};
  std::memcpy(last, row + whole, (width - whole) * sizeof(T));
  store(sum + whole, load(sum + whole) + factor * widen(last));
}

template <typename T>
void sum_rows(const ProductArgs& args, int64_t row, float* sum) {
  const T* dense = static_cast<const T*>(args.dense);
  constexpr int64_t kAhead = 4;  // rows of `dense` lie anywhere in memory: ask for them early
  const int64_t end = args.row_offsets[row + 1];
  for (int64_t e = args.row_offsets[row]; e < end; ++e) {
    if (e + kAhead < end) {
      const char* next = reinterpret_cast<const char*>(dense + args.indices[e + kAhead] * args.dense_stride);
      for (int64_t byte = 0; byte < args.width * static_cast<int64_t>(sizeof(T)); byte += 64) {
        __builtin_prefetch(next + byte);
      }
    }
    add_row(dense + args.indices[e] * args.dense_stride, args.values[e], args.width, sum);
  }
}

template <typename T>
void product_rows(const ProductArgs& args, int64_t begin, int64_t end, float* sum) {
  for (int64_t row = begin; row < end; ++row) {
    std::fill(sum, sum + padded(args.width), 0.0f);
    sum_rows<T>(args, row, sum);
    const int64_t at = row * args.out_stride;
    switch (args.out_dtype) {
      case Dtype::kFloat32:
        narrow_chunk(sum, args.width, static_cast<float*>(args.out) + at);
        break;
      case Dtype::kBFloat16:
        narrow_chunk(sum, args.width, static_cast<BFloat16*>(args.out) + at);
        break;
      case Dtype::kFloat16:
        narrow_chunk(sum, args.width, static_cast<Float16*>(args.out) + at);
        break;
    }
  }
}

void product(const ProductArgs& args, int64_t begin, int64_t end, float* scratch) {
  switch (args.dense_dtype) {
    case Dtype::kFloat32:
      return product_rows<float>(args, begin, end, scratch);
    case Dtype::kBFloat16:
      return product_rows<BFloat16>(args, begin, end, scratch);
    case Dtype::kFloat16:
      return product_rows<Float16>(args, begin, end, scratch);
  }
}

}  // namespace

namespace trl_fast {

extern const SparseKernels TRL_FAST_JOIN(kSparseKernels, CPU_CAPABILITY);
const SparseKernels TRL_FAST_JOIN(kSparseKernels, CPU_CAPABILITY) = {sample, product};

}  // namespace trl_fast
