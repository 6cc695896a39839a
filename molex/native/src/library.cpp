// The operators and classes that Python finds under torch.ops.molex and torch.classes.molex.

#include <torch/library.h>

#include <string>
#include <vector>

#include "attention.h"
#include "classes.h"
#include "rows.h"
#include "team.h"
#include "tensors.h"
#include "votes.h"

namespace molex {
namespace {

// `heads` [n, num_heads + 2 · num_kv_heads, head_dim] of requests whose tokens lie from offsets[i] to
// offsets[i + 1] → [n, num_heads, head_dim].
Tensor attend_packed(const Tensor& heads, const Tensor& offsets, int64_t num_kv_heads, double scaling, bool causal,
                     int64_t window) {
  TORCH_CHECK(heads.is_contiguous() && heads.dim() == 3 && num_kv_heads > 0 && heads.size(1) > 2 * num_kv_heads,
              "heads must be contiguous queries, keys and values");
  const AttentionShape shape{heads.size(1) - 2 * num_kv_heads, num_kv_heads, heads.size(2),
                             static_cast<float>(scaling),       causal,       window};
  TORCH_CHECK(shape.shares_evenly(), "query heads must share key heads evenly");
  TORCH_CHECK(offsets.is_contiguous() && offsets.scalar_type() == at::kLong && offsets.dim() == 1 &&
                  offsets.size(0) > 0, "offsets must be [r + 1]");
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  const int64_t requests = offsets.size(0) - 1;
  TORCH_CHECK(offset[0] == 0 && offset[requests] == heads.size(0) && std::is_sorted(offset, offset + requests + 1),
              "offsets must run from 0 to the number of tokens");
  Tensor result = at::empty({heads.size(0), shape.num_heads, shape.head_dim}, heads.options());
  with_values(heads, [&](const auto* values) {
    using T = std::decay_t<decltype(*values)>;
    attend(shape, values, offset, requests, result.mutable_data_ptr<T>());
  });
  return result;
}

// Logits [n, T] of the rows `tokens` [n] of hidden [m, d]: the first counts[0] of them by the first of the linear
// gates W [T, d], b [T], and so on.
Tensor gate_logits(const Tensor& hidden, const Tensor& tokens, const std::vector<int64_t>& counts,
                   const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
  TORCH_CHECK(hidden.is_contiguous() && hidden.dim() == 2 && tokens.is_contiguous(), "inputs must be contiguous");
  TORCH_CHECK(!counts.empty() && counts.size() == weights.size() && counts.size() == biases.size(),
              "there must be a count of tokens, weights and a bias for each gate");
  const int64_t width = hidden.size(1), outputs = weights[0].size(0);
  std::vector<GateRows> gates;
  for (size_t i = 0; i < counts.size(); ++i) {
    TORCH_CHECK(weights[i].is_contiguous() && weights[i].sizes() == at::IntArrayRef({outputs, width}) &&
                    biases[i].is_contiguous() && biases[i].numel() == outputs, "gates must be [T, d] and [T]");
    gates.push_back({weights[i].const_data_ptr<float>(), biases[i].const_data_ptr<float>(),
                     (gates.empty() ? 0 : gates.back().end) + counts[i]});
  }
  TORCH_CHECK(gates.back().end == tokens.size(0), "the gates do not share out all tokens");
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < tokens.size(0); ++i)
    TORCH_CHECK(0 <= token[i] && token[i] < hidden.size(0), "no row ", token[i], " in hidden");
  Tensor result = at::empty({tokens.size(0), outputs}, hidden.options().dtype(at::kFloat));
  with_values(hidden, [&](const auto* x) {
    gate_rows(x, width, token, gates, outputs, result.mutable_data_ptr<float>());
  });
  return result;
}

// Logits [n, T] of voting tokens, and the request 0..v-1 of each, in order → the layers [v, top_k] that each
// request chose, and their weights [v, top_k].
std::tuple<Tensor, Tensor> elect_layers(const Tensor& logits, const Tensor& owners, int64_t requests,
                                        const std::string& score, int64_t top_k) {
  const int64_t n = logits.size(0), layers = logits.size(1);
  TORCH_CHECK(logits.is_contiguous() && owners.is_contiguous() && owners.size(0) == n && top_k <= layers,
              "there must be an owner for each row of contiguous logits, and layers enough");
  const Score kind = score == "mode" ? Score::kVote : (score == "softmax" ? Score::kSoftmax : Score::kSigmoid);
  Tensor chosen = at::empty({requests, top_k}, owners.options());
  Tensor weights = at::empty({requests, top_k}, logits.options());
  const int64_t* owner = owners.const_data_ptr<int64_t>();
  int64_t begin = 0;
  for (int64_t r = 0; r < requests; ++r) {
    int64_t end = begin;
    while (end < n && owner[end] == r) ++end;
    elect(logits.const_data_ptr<float>() + begin * layers, end - begin, layers, kind, top_k,
          chosen.mutable_data_ptr<int64_t>() + r * top_k, weights.mutable_data_ptr<float>() + r * top_k);
    begin = end;
  }
  TORCH_CHECK(begin == n, "the owners of tokens must be in order");
  return {chosen, weights};
}

// The outputs [k, d] of a depth's own layer on all requests, whose rows lie from bounds[r] to bounds[r + 1], and
// behind them those of the `visits` [v] of requests to routed layers, in order → own[r] · the former +
// Σ_visits weights[v] · the latter [m, d].
Tensor mix(const Tensor& outputs, const Tensor& bounds, const Tensor& own, const Tensor& visits,
           const Tensor& weights) {
  TORCH_CHECK(outputs.is_contiguous(), "outputs must be contiguous");
  const auto terms = terms_of(bounds, own, visits, weights, outputs.size(0));
  const int64_t* bound = bounds.const_data_ptr<int64_t>();
  const int64_t requests = own.size(0), width = outputs.size(1);
  Tensor result = at::empty({bound[requests], width}, outputs.options());
  with_values(outputs, [&](const auto* x) {
    using T = std::decay_t<decltype(*x)>;
    mix_rows(x, terms, bound, width, result.mutable_data_ptr<T>());
  });
  return result;
}

// From the next pass of the calling thread on, it and those it works with run on one of these CPUs each.
void spread(const std::vector<int64_t>& cpus) {
  for (const int64_t cpu : cpus) TORCH_CHECK(0 <= cpu && cpu < CPU_SETSIZE, "no CPU ", cpu);
  chosen_cpus() = cpus;
}

}  // namespace
}  // namespace molex

TORCH_LIBRARY(molex, m) {
  m.class_<molex::PackedLayers>("PackedLayers")
      .def(torch::init<bool, std::string, bool, bool, double, int64_t, int64_t>())
      .def("add", &molex::PackedLayers::add)
      .def("project", &molex::PackedLayers::project)
      .def("finish", &molex::PackedLayers::finish);
  m.class_<molex::PackedVocabulary>("Vocabulary")
      .def(torch::init<std::vector<at::Tensor>, int64_t>())
      .def("logits", &molex::PackedVocabulary::logits)
      .def("embed", &molex::PackedVocabulary::embed);
  m.class_<molex::Depths>("Depths")
      .def(torch::init<c10::intrusive_ptr<molex::PackedLayers>, at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor,
                       at::Tensor, at::Tensor, at::Tensor, at::Tensor>())
      .def("run", &molex::Depths::run)
      .def("routed_layers", &molex::Depths::routed_layers);
  m.class_<molex::Decoding>("Decoding")
      .def(torch::init<c10::intrusive_ptr<molex::PackedLayers>, int64_t, int64_t, int64_t, int64_t, double, int64_t>())
      .def("add", &molex::Decoding::add)
      .def("step", &molex::Decoding::step);
  m.def("attend", &molex::attend_packed);
  m.def("gate_logits", &molex::gate_logits);
  m.def("elect", &molex::elect_layers);
  m.def("mix", &molex::mix);
  m.def("spread", &molex::spread);
}
