// Several projections with adapters: what lora_qkv and lora_mlp share.
#pragma once

#include <vector>

#include "cpu/lora_linear.h"

namespace peftkern {

using Numbers = std::vector<double>;

// The lists of a schema, one entry per projection.
struct ProjectionLists {
    const Tensors& w;
    const Integers& wf;
    const Tensors &lora_as, &lora_bs;
    const Numbers& scalings;
    double dropout_p;
    const OptionalTensor& seeds;  // [projections]
};

// One of them, checked. An adapter of rank 0 stands for none.
struct Projection {
    Weight base;
    Adapter adapter;
    float scaling;
    Dropout dropout;
    int64_t first_rank;  // where its columns of the stacked h begin
};
using Projections = std::vector<Projection>;
Projections projections_of(const char* op, const ProjectionLists& lists);
int64_t total_rank(const Projections& projections);

// The columns of h [rows, ranks] that are one projection's.
Tensor columns_of(const Tensor& h, const Projection& projection);

// y = x W^T + s h B^T + bias; an empty bias stands for none.
Tensor project(const char* op, const Rows& x, const Tensor& h, const Projection& projection, const Tensor& bias);

// A of one projection, or of several stacked: products with A that share x, or whose sum is wanted, are then one.
struct LowRank {
    Rows a;  // [rank, in]
    int64_t first_rank;
    Dropout dropout;
};
std::vector<LowRank> low_rank_of(const Projections& projections, int64_t rows);

// Write the columns of h, and of dh, that are these projections'.
void down_projections(const char* op, const Rows& x, const std::vector<LowRank>& low_rank, const Tensor& h);
void grad_h_into(const char* op, const std::vector<Rows>& dys, const Projections& projections, const Tensor& grad_h);

// dx = sum over i of dy_i W_i + mask_i * (dh_i A_i), rounded once.
void grad_x_into(const char* op, const std::vector<Rows>& dys, const Tensor& grad_h, const Projections& projections,
                 const std::vector<LowRank>& low_rank, const Tensor& grad_x);

// dA of all, one below the other, in their dtype (fp32 if they have several); dB of each.
Tensor grad_a_of(const char* op, const Tensor& grad_h, const Rows& x, const Projections& projections);
Tensors grad_b_of(const char* op, const std::vector<Rows>& dys, const Tensor& h, const Projections& projections);

}  // namespace peftkern
