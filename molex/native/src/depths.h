// Depths of a pass, one after the other in one parallel region: votes, both halves of all layer calls, mixtures.
#pragma once

#include <optional>
#include <vector>

#include "layers.h"

namespace molex {

// The gates of a depth on the tokens that vote, then the choices of each request from its tokens' logits.
template <class T>
void Layers<T>::vote(int64_t depth, Matrix<const T> hidden, const Requests& requests, std::vector<float>& logits,
                     Region<Scratch<T>>& region) const {
  const Team& everyone = region.everyone;
  everyone.share(requests.ballots(), [&](int64_t i) {
    const int64_t r = requests.voters[i];
    const Mixture& gate = requests.mixture(depth, r);
    if (!gate.mixes()) return;
    const Request& request = requests.all[r];
    float* y = logits.data() + i * depth_;
    dots(hidden.row(request.begin + i - request.first_ballot), gate.weight, depth_, hidden.width, 1.0f, y);
    for (int64_t j = 0; j < depth_; ++j) y[j] += gate.bias[j];
  });
  everyone.barrier();
  everyone.share(requests.size(), [&](int64_t r) {
    const Request& request = requests.all[r];
    if (request.voters == 0 || !requests.mixture(depth, r).mixes()) return;
    const int64_t first = requests.choices(depth, r);
    elect(logits.data() + request.first_ballot * depth_, request.voters, depth_, request.score, request.top_k,
          requests.chosen + first, requests.shares + first);
  });
  everyone.barrier();
}

// Keep the keys and values of one key head of a request's tokens behind those of earlier ones.
template <class T>
void keep(const AttentionShape& shape, const Tokens<T>& tokens, int64_t kv_head, const Stream<T>& stream) {
  for (int64_t i = tokens.past; i < tokens.total(); ++i) {
    std::copy_n(tokens.key(shape, kv_head, i), shape.head_dim, stream.key(kv_head, i));
    std::copy_n(tokens.value(shape, kv_head, i), shape.head_dim, stream.value(kv_head, i));
  }
}

template <class T>
Tensor Layers<T>::run(const Tensor& hidden, int64_t first, int64_t end, const Requests& requests, const Tensor& factors,
                      const AttentionShape& shape, const Positions& positions, int64_t& routed_layers) const {
  int64_t places = 0;
  for (const Request& request : requests.all) places += request.count() * (1 + request.top_k);
  Buffers<T> buffers(places, shape, hidden);
  std::vector<float> logits(requests.ballots() * depth_);
  std::optional<Depth> depth;
  std::optional<Pass> read, finished;
  const int64_t first_routed = size() - depth_;
  in_one_region<Scratch<T>>([&](Region<Scratch<T>>& region) {
    for (int64_t t = first; t < end; ++t) {
      const Matrix<const T> input = t == first ? matrix_of<T>(hidden) : buffers.states[(t + 1) % 2];
      const Matrix<T> output = buffers.states[t % 2];
      if (requests.mix_at(t)) vote(t, input, requests, logits, region);
      if (region.everyone.rank == 0) {
        depth.emplace(requests, t, first_routed, t == depth_ - 1);
        read.emplace(depth->read.pass(factors, sites()));
        finished.emplace(depth->finished.pass(factors, sites()));
        routed_layers += depth->routed_layers();
      }
      region.everyone.barrier();
      region.share_blocks(read->blocks.size(), [&](int64_t i, const Team& team, Scratch<T>& s) {
        project_block(read->blocks[i], input, depth->read.rows(), *read, team, s, buffers.heads);
      });
      if (positions.cos.numel())
        region.share(depth->read.size(), [&](int64_t place) {
          const Position position = positions.of(depth->read.rows()[place]);
          T* turning = buffers.heads.row(place);
          for (int64_t head = 0; head < shape.num_heads + shape.num_kv_heads; ++head)
            rotate(turning + head * shape.head_dim, position, shape.head_dim, 1.0f, turning + head * shape.head_dim);
        });
      region.share(depth->visits.size() * shape.num_kv_heads, [&](int64_t item) {
        const Visit& visit = depth->visits[item / shape.num_kv_heads];
        const Request& request = requests.all[visit.request];
        const int64_t begin = depth->first(request), kv_head = item % shape.num_kv_heads;
        Tokens<T> tokens{buffers.heads.row(visit.begin), request.count(), request.past};
        std::optional<Stream<T>> stream;
        if (requests.streams.are_of(visit.request)) {
          tokens.earlier = &stream.emplace(requests.streams.at<T>(t, visit.request, visit.stream));
          keep(shape, tokens, kv_head, *stream);
        }
        attend_request(shape, tokens, begin, begin + depth->count(request), kv_head, buffers.attended.row(visit.result));
      });
      region.share_blocks(finished->blocks.size(), [&](int64_t i, const Team& team, Scratch<T>& s) {
        finish_block(finished->blocks[i], input, depth->finished.rows(), buffers.attended, *finished, team, s, output);
      });
      region.share(depth->terms.size(), [&](int64_t r) {
        const int64_t own = depth->visits[r].result;
        for (int64_t i = 0; i < depth->count(requests.all[r]); ++i)
          mix_row(output.values, depth->terms[r], i, output.width, output.row(own + i));
      });
    }
  });
  const Request& final = requests.all.back();
  return buffers.output(end + 1, depth->visits[requests.size() - 1].result + depth->count(final));
}

}  // namespace molex
