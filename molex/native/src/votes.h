// Votes: from the logits of the tokens of a request to the layers that it runs through.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "elementwise.h"

namespace molex {

// What a token gives each layer: a vote for the one with its largest logit, or a score to all of them.
enum class Score { kVote, kSoftmax, kSigmoid };

// Add what a token with these logits gives to the sums [layers] of its request.
inline void add_scores(const float* logits, int64_t layers, Score score, float* sums) {
  const float* most = std::max_element(logits, logits + layers);
  if (score == Score::kVote) {
    sums[most - logits] += 1.0f;
  } else if (score == Score::kSigmoid) {
    for (int64_t j = 0; j < layers; ++j) sums[j] += sigmoid(logits[j]);
  } else {
    float total = 0.0f;
    for (int64_t j = 0; j < layers; ++j) total += exponential(logits[j] - *most);
    for (int64_t j = 0; j < layers; ++j) sums[j] += exponential(logits[j] - *most) / total;
  }
}

// The sums [layers] of the scores of `tokens` rows of logits.
inline std::vector<float> summed_scores(const float* logits, int64_t tokens, int64_t layers, Score score) {
  std::vector<float> sums(layers);
  for (int64_t i = 0; i < tokens; ++i) add_scores(logits + i * layers, layers, score, sums.data());
  return sums;
}

// The layers with the largest sums, of equal ones the first. Comparisons with NaN choose nobody, so that a
// request whose logits are not finite still runs through layers that there are.
inline void choose(const std::vector<float>& sums, int64_t top_k, int64_t* chosen) {
  for (int64_t c = 0; c < top_k; ++c) {
    int64_t best = -1;
    for (int64_t j = 0; j < static_cast<int64_t>(sums.size()); ++j)
      if (std::find(chosen, chosen + c, j) == chosen + c && (best < 0 || sums[j] > sums[best])) best = j;
    chosen[c] = best;
  }
}

// The parts of the chosen layers in the sum of their probabilities; even ones where all are too small for a float.
inline void share(const std::vector<float>& probabilities, const int64_t* chosen, int64_t top_k, float* weights) {
  float total = 0.0f;
  for (int64_t c = 0; c < top_k; ++c) total += probabilities[chosen[c]];
  for (int64_t c = 0; c < top_k; ++c)
    weights[c] = total > 0.0f ? probabilities[chosen[c]] / total : 1.0f / static_cast<float>(top_k);
}

// One request's layers [top_k] and their weights [top_k], of sum 1.
inline void elect(const float* logits, int64_t tokens, int64_t layers, Score score, int64_t top_k, int64_t* chosen,
                  float* weights) {
  choose(summed_scores(logits, tokens, layers, score), top_k, chosen);
  if (top_k == 1)
    weights[0] = 1.0f;
  else
    share(summed_scores(logits, tokens, layers, Score::kSoftmax), chosen, top_k, weights);
}

}  // namespace molex
