// The requests of a pass, the layers that they choose at each depth, and the rows of the layer calls that follow.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "low_rank.h"
#include "pass.h"
#include "rows.h"
#include "stream.h"
#include "votes.h"

namespace molex {

// Routed layers that a request may visit at a depth.
constexpr int64_t kMaxChoices = 2;

// A request's tokens begin..end, behind `past` ones that are cached. The first `voters` of them vote, and are the ballots
// from `first_ballot` on; of the tokens from `first_needed` on so many are `needed` of the last depth.
struct Request {
  int64_t count() const { return end - begin; }

  int64_t begin, end, past, member, voters, top_k;
  Score score;
  int64_t first_needed, needed, first_ballot;
};

// What an adapter has at a depth: a linear gate W [T, d], b [T], where it mixes, and the weights of both branches.
struct Mixture {
  bool mixes() const { return weight != nullptr; }

  const float* weight = nullptr;
  const float* bias = nullptr;
  float own = 1.0f, routed = 0.0f;
};

struct Requests {
  int64_t size() const { return all.size(); }
  int64_t ballots() const { return voters.size(); }
  const Mixture& mixture(int64_t depth, int64_t request) const {
    return mixtures[depth * members + all[request].member];
  }
  bool mix_at(int64_t depth) const {
    return std::any_of(mixtures.begin() + depth * members, mixtures.begin() + (depth + 1) * members,
                       [](const Mixture& mixture) { return mixture.mixes(); });
  }

  std::vector<Request> all;
  // Where the choices of a request at a depth begin.
  int64_t choices(int64_t depth, int64_t request) const { return (depth * size() + request) * kMaxChoices; }

  std::vector<int64_t> voters;     // the request of each ballot
  std::vector<Mixture> mixtures;   // [depths, members]
  int64_t members = 0;
  Streams streams;                 // where keys and values are kept
  int64_t* chosen = nullptr;       // [depths, requests, kMaxChoices] layers
  float* shares = nullptr;         // of the routed branch's weight, of sum 1
};

// Requests side by side, layer call by layer call.
class Places {
 public:
  void begin_call(int64_t layer) { layers_.push_back(layer), counts_.push_back(0); }

  // The next `count` places of the call are rows first.. of an adapter's.
  void add(int64_t member, int64_t first, int64_t count) {
    const int64_t begin = rows_.size();
    for (int64_t i = 0; i < count; ++i) rows_.push_back(first + i);
    counts_.back() += count;
    if (!runs_.empty() && runs_.back().member == member)
      runs_.back().end += count;
    else
      runs_.push_back({member, begin, begin + count});
  }

  const int64_t* rows() const { return rows_.data(); }
  int64_t size() const { return rows_.size(); }
  Pass pass(const at::Tensor& factors, int64_t sites) const { return {layers_, counts_, runs_, factors, sites}; }

 private:
  std::vector<int64_t> layers_, counts_, rows_;
  std::vector<Run> runs_;
};

// A request in a layer call: its tokens lie from place `begin` on, and its needed ones from `result` on. Keys and values
// are kept in stream 0 of the own layer, or in that of a choice.
struct Visit {
  int64_t request, stream, begin, result;
};

// One depth of a pass. At the last one only what is needed is finished; elsewhere all tokens are.
struct Depth {
  Depth(const Requests& requests, int64_t depth, int64_t first_routed, bool last) : last_(last) {
    begin_call(depth);
    for (int64_t r = 0; r < requests.size(); ++r) visit(requests.all[r], r, 0);
    if (!requests.mix_at(depth)) return;
    for (int64_t r = 0; r < requests.size(); ++r)
      terms.push_back({{visits[r].result, requests.mixture(depth, r).own}});
    for (const Chosen& chosen : sorted(requests, depth)) {
      if (chosen.layer == depth) {
        // The routed layer is the own one: it runs once, with both weights.
        terms[chosen.request][0].weight += chosen.weight;
        continue;
      }
      if (chosen.layer != layer_ - first_routed || calls_ == 1) begin_call(first_routed + chosen.layer);
      visit(requests.all[chosen.request], chosen.request, 1 + chosen.choice);
      terms[chosen.request].push_back({visits.back().result, chosen.weight});
    }
  }

  // The tokens of a request that are finished.
  int64_t first(const Request& request) const { return last_ ? request.first_needed : 0; }
  int64_t count(const Request& request) const { return last_ ? request.needed : request.count(); }
  int64_t routed_layers() const { return calls_ - 1; }

  Places read, finished;
  std::vector<Visit> visits;              // those of the own layer first, in order of the requests
  std::vector<std::vector<Term>> terms;   // of each request; none where nothing mixes

 private:
  struct Chosen {
    int64_t layer, request, choice;
    float weight;
  };

  static std::vector<Chosen> sorted(const Requests& requests, int64_t depth) {
    std::vector<Chosen> all;
    for (int64_t r = 0; r < requests.size(); ++r) {
      const Mixture& mixture = requests.mixture(depth, r);
      const int64_t first = requests.choices(depth, r);
      for (int64_t c = 0; mixture.mixes() && c < requests.all[r].top_k; ++c)
        all.push_back({requests.chosen[first + c], r, c, mixture.routed * requests.shares[first + c]});
    }
    std::stable_sort(all.begin(), all.end(), [](const Chosen& a, const Chosen& b) { return a.layer < b.layer; });
    return all;
  }

  void begin_call(int64_t layer) {
    layer_ = layer, ++calls_;
    read.begin_call(layer), finished.begin_call(layer);
  }

  void visit(const Request& request, int64_t number, int64_t stream) {
    visits.push_back({number, stream, read.size(), finished.size()});
    read.add(request.member, request.begin, request.count());
    finished.add(request.member, request.begin + first(request), count(request));
  }

  bool last_;
  int64_t layer_ = 0, calls_ = 0;
};

}  // namespace molex
