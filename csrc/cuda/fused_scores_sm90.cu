// The head's product and its row statistics in one kernel, by CUTLASS, for Hopper's GPUs (sm_90a).
//
// Product: two warpgroups in turns, each with a tile of its own: while one multiplies, the other scores the logits
// that it has in its registers, so that scoring is hidden behind multiplying. A third one brings the factors by TMA;
// the two blocks of a cluster lie below each other and share what they read of the weight. Tiles that follow each
// other share columns in groups of eight, so that their part of the weight is read from memory once and then from the
// cache.
//
// CUTLASS has everything of that but what is done to the logits, which is tile_scores.cuh.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/tile_scores.cuh"
#include "cute/tensor.hpp"
#include "cutlass/cluster_launch.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/detail.hpp"
#include "cutlass/epilogue/dispatch_policy.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace trl_fast {
namespace {

using namespace cute;

using TileShape = Shape<Int<kFusedRows>, Int<kFusedColumns>, _64>;
using ClusterShape = Shape<_2, _1, _1>;
// Columns of tiles that share rows before the next rows are taken.
constexpr int kGroup = 8;
constexpr int kTileParts = kFusedColumns / kPartColumns;
constexpr int kAlignment = 8;  // elements

// Whether accumulators lie as tile_scores.cuh has them, by a layout from (thread, value) to row + 64 * column.
template <class Layout>
constexpr bool lie_as_expected(Layout layout) {
  for (int thread : {0, 1, 3, 4, 31, 32, 70, 127}) {
    for (int k : {0, 1, 2, 17, kFusedColumns / 4 - 1}) {
      for (int half = 0; half < 2; ++half) {
        const int row = thread / 32 * 16 + half * 8 + thread % 32 / 4, column = k / 2 * 8 + thread % 4 * 2 + k % 2;
        if (int(layout(thread, make_coord(k % 2, half, k / 2))) != row + 64 * column) return false;
      }
    }
  }
  return true;
}

// What CUTLASS asks of an epilogue; there is no output matrix.
struct ScoreEpilogue {
  using EpilogueSchedule = cutlass::epilogue::NoSmemWarpSpecialized;
  using DispatchPolicy = EpilogueSchedule;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using ElementC = float;
  using ElementD = float;
  using StrideC = Stride<int64_t, _1, int64_t>;
  using StrideD = StrideC;
  struct SharedStorage {};
  using Arguments = TileScoreArgs;
  using Params = TileScoreArgs;

  template <class Problem>
  static constexpr Params to_underlying_arguments(const Problem&, const Arguments& args, void*) {
    return args;
  }

  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }

  template <class Problem>
  static cutlass::Status initialize_workspace(const Problem&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  template <class Problem>
  static bool can_implement(const Problem&, const Arguments&) {
    return true;
  }

  const Params& params;

  CUTLASS_HOST_DEVICE explicit ScoreEpilogue(const Params& params) : params(params) {}

  // Called by the 128 threads of a warpgroup, with the accumulators of a tile.
  template <class Problem, class Block, class Coordinates, class Engine, class Layout, class Mma, class Residue>
  CUTLASS_DEVICE void operator()(const Problem&, const Block&, const Coordinates& tile,
                                 const Tensor<Engine, Layout>& accumulators, const Mma&, const Residue&, int thread,
                                 char*) const {
    static_assert(lie_as_expected(typename Mma::AtomLayoutC_TV{}));
    static_assert(shape(Layout{}) == Shape<Shape<_2, _2, Int<kFusedColumns / 8>>, Int<kFusedRows / 64>, _1>{});
    const int lane = thread % kWarpSize;
    CUTLASS_PRAGMA_UNROLL
    for (int r = 0; r < kFusedRows / 32; ++r) {
      const int half = r % 2, atom = r / 2;
      const int row = get<0>(tile) * kFusedRows + atom * 64 + thread / kWarpSize * 16 + half * 8 + lane / kQuad;
      CUTLASS_PRAGMA_UNROLL
      for (int p = 0; p < kTileParts; ++p) {
        Fragment fragment(row, get<1>(tile) * kTileParts + p, lane);
        CUTLASS_PRAGMA_UNROLL
        for (int k = 0; k < Fragment::kSize; ++k) {
          fragment.u[k] = accumulators(make_coord(k % 2, half, p * Fragment::kSize / 2 + k / 2), atom, 0);
        }
        score_fragment(params, fragment);
      }
    }
  }
};

template <typename Element>
struct Fused {
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, kAlignment, Element,
      cutlass::layout::ColumnMajor, kAlignment, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<0>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<ScoreEpilogue>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
};

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::MaxThreadsPerBlock, Kernel::MinBlocksPerMultiprocessor)
    fused_scores_kernel(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ char shared[];
  Kernel{}(params, shared);
}

void check(bool accepted, const char* why) {
  if (!accepted) throw std::runtime_error(std::string("fused_scores: ") + why);
}

void check(cudaError_t error) { check(error == cudaSuccess, cudaGetErrorString(error)); }

template <typename Element>
void run(const FusedFactors& factors, const TileScoreArgs& args, cudaStream_t stream) {
  using Kernel = typename Fused<Element>::Kernel;
  static_assert(Kernel::SharedStorageSize <= cutlass::gemm::collective::detail::sm90_smem_capacity_bytes);
  typename Kernel::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {static_cast<int>(args.rows), static_cast<int>(args.columns),
                             static_cast<int>(factors.hidden_size), 1};
  arguments.mainloop = {static_cast<const Element*>(factors.hidden),
                        {factors.hidden_stride, _1{}, 0},
                        static_cast<const Element*>(factors.weight),
                        {factors.weight_stride, _1{}, 0}};
  arguments.epilogue = args;
  cutlass::KernelHardwareInfo& device = arguments.hw_info;
  check(cudaGetDevice(&device.device_id));
  check(cudaDeviceGetAttribute(&device.sm_count, cudaDevAttrMultiProcessorCount, device.device_id));
  arguments.scheduler.max_swizzle_size = kGroup;
  arguments.scheduler.raster_order = decltype(arguments.scheduler.raster_order)::AlongM;
  check(Kernel::can_implement(arguments), "the factors' strides or sizes do not serve");

  typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);
  const auto kernel = fused_scores_kernel<Kernel>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize));
  const dim3 cluster(size<0>(ClusterShape{}), size<1>(ClusterShape{}), size<2>(ClusterShape{}));
  void* given[] = {&params};
  const cutlass::Status launched = cutlass::ClusterLauncher::launch(
      Kernel::get_grid_shape(params), cluster, Kernel::get_block_shape(), Kernel::SharedStorageSize, stream,
      reinterpret_cast<const void*>(kernel), given);
  check(cudaGetLastError());
  check(launched == cutlass::Status::kSuccess, cutlass::cutlassGetStatusString(launched));
}

}  // namespace

namespace cuda {

void launch_fused_scores(const FusedFactors& factors, const TileScoreArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.columns == 0) return;
  if (factors.dtype == Dtype::kBFloat16) {
    run<cutlass::bfloat16_t>(factors, args, stream);
  } else {
    run<cutlass::half_t>(factors, args, stream);
  }
}

}  // namespace cuda
}  // namespace trl_fast
