// Registers linear layers that read one input, with adapters or not, with their backward pass in C++.
//
// trl_fast/ops/layers/joint_linear.py specifies them, and has them in Python too: for CPUs whose products are ours,
// and for compilers and simulations. These do the same by ATen's products, without Python in between.
#include <ATen/autocast_mode.h>

#include <algorithm>
#include <string>
#include <vector>

#include "autograd_support.h"

namespace trl_fast {
namespace {

at::Tensor as_rows(const at::Tensor& x) { return x.reshape({-1, x.size(-1)}); }

// Rows (R, V) as (..., V), like x (..., H). It is no view for autograd: who gets it may write to it.
at::Tensor shaped(const at::Tensor& rows, const at::Tensor& x) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = rows.size(-1);
  return at::_unsafe_view(rows, shape);
}

at::Tensor product(const at::Tensor& left, const at::Tensor& right) {
  at::Tensor out = room_for({left.size(0), right.size(1)}, left);
  return at::mm_out(out, left, right);
}

// Adds left @ right to a sum, which is the first product where there is none.
void add_product(at::Tensor& sum, const at::Tensor& left, const at::Tensor& right) {
  if (sum.defined()) {
    sum.addmm_(left, right);
  } else {
    sum = product(left, right);
  }
}

// Matrices side by side (dimension 1) or below each other (0); one alone is not copied.
at::Tensor joined(const variable_list& matrices, int64_t dimension) {
  return matrices.size() == 1 ? matrices[0] : at::cat(matrices, dimension);
}

// x Wᵀ + b + s (x Aᵀ) Bᵀ (..., V), and s x Aᵀ (R, r). An op, since checkpointing may keep its results.
Both lora_product(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& lora_a,
                  const at::Tensor& lora_b, double scaling) {
  const at::Tensor rows = as_rows(x), low = product(rows, lora_a.t()).mul_(scaling);
  at::Tensor y = room_for({rows.size(0), weight.size(0)}, x);
  if (bias) {
    at::addmm_out(y, *bias, rows, weight.t());
  } else {
    at::mm_out(y, rows, weight.t());
  }
  return {shaped(y.addmm_(low, lora_b.t()), x), low};
}

// Where x and the tensors of a layer stand among those that an op gets; -1: the layer has none.
constexpr int64_t kX = 0;
struct Places {
  int64_t weight, bias, lora_a, lora_b;
};

// What layers of an op have: autograd gets x (..., H), and of each layer what is there of W (V, H), b (V), A (r, H), B
// (V, r).
struct Layers {
  std::string op;
  std::vector<int64_t> has_bias, has_adapter;
  std::vector<double> scalings;

  std::vector<Places> places() const {
    std::vector<Places> found;
    int64_t next = kX + 1;
    for (size_t i = 0; i < scalings.size(); ++i) {
      Places layer = {next++, -1, -1, -1};
      if (has_bias[i]) layer.bias = next++;
      if (has_adapter[i]) {
        layer.lora_a = next++;
        layer.lora_b = next++;
      }
      found.push_back(layer);
    }
    return found;
  }

  int64_t number_of_tensors() const {
    const auto count = [](const std::vector<int64_t>& has) { return std::count(has.begin(), has.end(), 1); };
    return kX + 1 + static_cast<int64_t>(scalings.size()) + count(has_bias) + 2 * count(has_adapter);
  }

  void save(AutogradContext* ctx) const {
    ctx->saved_data["op"] = op;
    ctx->saved_data["has_bias"] = has_bias;
    ctx->saved_data["has_adapter"] = has_adapter;
    ctx->saved_data["scalings"] = scalings;
  }

  static Layers of(AutogradContext* ctx) {
    return {ctx->saved_data["op"].toStringRef(), ctx->saved_data["has_bias"].toIntVector(),
            ctx->saved_data["has_adapter"].toIntVector(), ctx->saved_data["scalings"].toDoubleVector()};
  }
};

at::Tensor at_place(at::TensorList tensors, int64_t place) { return place < 0 ? at::Tensor() : tensors[place]; }

// What backward keeps beside x: so many tensors a layer.
enum Kept { kWeight, kLoraA, kLoraB, kLow, kKept };

class JointLinear : public Function<JointLinear> {
 public:
  static variable_list forward(AutogradContext* ctx, at::TensorList given, const Layers& layers) {
    static const auto with_adapter =
        kernel<Both(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&,
                    double)>("trl_fast::lora_product");
    const at::Tensor &x = given[kX], rows = as_rows(x);
    const std::vector<Places> places = layers.places();
    variable_list made(places.size()), kept(1 + kKept * places.size());
    for (size_t i = 0; i < places.size(); ++i) {
      const at::Tensor weight = given[places[i].weight], lora_a = at_place(given, places[i].lora_a),
                       lora_b = at_place(given, places[i].lora_b);
      const OptionalTensor bias = optional(at_place(given, places[i].bias));
      at::Tensor* const of = &kept[1 + kKept * i];
      if (lora_a.defined()) {
        std::tie(made[i], of[kLow]) = with_adapter.call(x, weight, bias, lora_a, lora_b, layers.scalings[i]);
      } else {
        made[i] = shaped(at::linear(rows, weight, bias), x);
      }
      if (x.requires_grad()) of[kWeight] = weight;
      of[kLoraA] = lora_a;
      of[kLoraB] = lora_b;
      if (weight.requires_grad() || (lora_a.defined() && lora_a.requires_grad())) kept[0] = x;
    }
    layers.save(ctx);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(std::move(kept));
    return made;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Layers layers = Layers::of(ctx);
    check_first_derivative(layers.op);
    const std::vector<Places> places = layers.places();
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor rows = saved[0].defined() ? as_rows(saved[0]) : at::Tensor();
    const auto needs = [&](int64_t place) { return place >= 0 && ctx->needs_input_grad(place); };
    // One for each tensor that was given, and one for what the layers have.
    variable_list found(layers.number_of_tensors() + 1);
    Adapters adapters;
    at::Tensor by_x, like;
    for (size_t i = 0; i < places.size(); ++i) {
      if (!grads[i].defined()) continue;
      const Places& of = places[i];
      const at::Tensor* const kept = &saved[1 + kKept * i];
      const at::Tensor grad = as_rows(grads[i]);
      like = grads[i];
      if (needs(kX)) add_product(by_x, grad, kept[kWeight]);
      if (needs(of.weight)) found[of.weight] = product(grad.t(), rows);
      if (needs(of.bias)) found[of.bias] = grad.sum(0);
      if (needs(of.lora_b)) found[of.lora_b] = product(kept[kLow].t(), grad).t().contiguous();
      if (kept[kLoraA].defined() && (needs(kX) || needs(of.lora_a))) {
        adapters.add(of.lora_a, kept[kLoraA], product(grad, kept[kLoraB]).mul_(layers.scalings[i]));
      }
    }
    if (!adapters.places.empty()) {
      const at::Tensor by_low = joined(adapters.by_low, 1);
      if (needs(kX)) add_product(by_x, by_low, joined(adapters.lora_a, 0));
      if (std::any_of(adapters.places.begin(), adapters.places.end(), needs))
        adapters.give(product(by_low.t(), rows), found);
    }
    if (by_x.defined()) found[kX] = shaped(by_x, like);
    return found;
  }

 private:
  // Adapters whose gradients by x, and by each A, are one product.
  struct Adapters {
    std::vector<int64_t> places;
    variable_list lora_a, by_low;

    void add(int64_t place, const at::Tensor& a, const at::Tensor& by) {
      places.push_back(place);
      lora_a.push_back(a);
      by_low.push_back(by);
    }

    // Puts rows of a gradient into the places of the A's, each in its own memory: an engine may take a gradient for
    // all of its storage.
    void give(const at::Tensor& by_all, variable_list& found) const {
      for (int64_t i = 0, row = 0; i < static_cast<int64_t>(places.size()); row += lora_a[i++].size(0)) {
        found[places[i]] = by_all.narrow(0, row, lora_a[i].size(0)).clone();
      }
    }
  };
};

// Names of an op and of what it is given, for messages.
struct Names {
  const char *op, *weight, *bias, *lora_a, *lora_b;
};

// Collects what autograd gets, as autocast hands it to products.
class Given {
 public:
  Given(const at::Tensor& x, const Names& names) : device_(x.device().type()), names_(names) {
    autocasts_ = at::autocast::is_autocast_enabled(device_);
    dtype_ = autocasts_ ? at::autocast::get_autocast_dtype(device_) : x.scalar_type();
    tensors_ = {cast(x)};
    layers_.op = names.op;
  }

  void add(const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& lora_a,
           const OptionalTensor& lora_b, double scaling) {
    const int64_t width = tensors_[kX].size(-1), outputs = rows_of(weight);
    add(names_.weight, weight, {outputs, width});
    if (bias) add(names_.bias, *bias, {outputs});
    if (lora_a) {
      add(names_.lora_a, *lora_a, {rows_of(*lora_a), width});
      add(names_.lora_b, *lora_b, {outputs, rows_of(*lora_a)});
    }
    layers_.has_bias.push_back(bias.has_value());
    layers_.has_adapter.push_back(lora_a.has_value());
    layers_.scalings.push_back(scaling);
  }

  variable_list apply() const {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(
        at::autocast::get_autocast_dispatch_key_from_device_type(device_));
    return JointLinear::apply(at::TensorList(tensors_), layers_);
  }

 private:
  static int64_t rows_of(const at::Tensor& matrix) { return matrix.dim() ? matrix.size(0) : 1; }

  at::Tensor cast(const at::Tensor& tensor) const {
    return autocasts_ ? at::autocast::cached_cast(dtype_, tensor, device_) : tensor;
  }

  void add(const char* name, const at::Tensor& given, at::IntArrayRef shape) {
    const at::Tensor &x = tensors_[kX], tensor = cast(given);
    TORCH_CHECK_VALUE(
        tensor.scalar_type() == x.scalar_type() && tensor.sizes() == shape && tensor.device() == x.device(), name,
        ": expected ", x.scalar_type(), " of shape ", shape, " on ", x.device(), ", got ", tensor.scalar_type(), " ",
        tensor.sizes(), " on ", tensor.device());
    tensors_.push_back(tensor);
  }

  c10::DeviceType device_;
  Names names_;
  bool autocasts_;
  at::ScalarType dtype_;
  variable_list tensors_;
  Layers layers_;
};

variable_list joint_linear(const at::Tensor& x, at::TensorList weights, const c10::List<OptionalTensor>& biases,
                           const c10::List<OptionalTensor>& lora_as, const c10::List<OptionalTensor>& lora_bs,
                           at::ArrayRef<double> scalings) {
  Given given(x, {"joint_linear", "weights", "biases", "adapters", "adapters"});
  for (size_t i = 0; i < weights.size(); ++i) {
    given.add(weights[i], biases.get(i), lora_as.get(i), lora_bs.get(i), scalings[i]);
  }
  return given.apply();
}

at::Tensor lora_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                       const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling) {
  Given given(x, {"lora_linear", "weight", "bias", "lora_a", "lora_b"});
  given.add(weight, bias, lora_a, lora_b, scaling);
  return given.apply()[0];
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trl_fast, m) {
  m.def(
      "lora_product(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling) "
      "-> (Tensor, Tensor)");
  m.def(
      "eager_joint_linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] lora_as, Tensor?[] lora_bs, "
      "float[] scalings) -> Tensor[]",
      &joint_linear);
  m.def(
      "eager_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling) "
      "-> Tensor",
      &lora_linear);
}

TORCH_LIBRARY_IMPL(trl_fast, CompositeExplicitAutograd, m) { m.impl("lora_product", &lora_product); }

}  // namespace trl_fast
