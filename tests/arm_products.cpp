// Products on ARM of repacked matrices with 2 to 16 rows beside the same rows one at a time, which are llama.cpp's own
// (ggml_gemv_*), and of matrices of floats, which are ours: equal to the last bit, also where experts share rows, and not left
// to llama.cpp's kernels. `make check-arm` builds and runs it under emulation.

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "small-batch/floats.h"
#include "small-batch/small-batch.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

static const int EXPERTS = 4, USED = 2, MOST = 16;
static std::mt19937 engine(7);

static std::vector<float> random_values(size_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> values(n);
    for (float & x : values) {
        x = normal(engine);
    }
    return values;
}

static ggml_context * new_context() {
    return ggml_init({ 1 << 20, nullptr, true });
}

static ggml_backend_buffer_type_t repack_buffer_type(ggml_backend_t backend) {
    ggml_backend_dev_t device = ggml_backend_get_device(backend);
    auto types = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device),
                                                                                         "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * type = types(device); *type; type++) {
        if (strcmp(ggml_backend_buft_name(*type), "CPU_REPACK") == 0) {
            return *type;
        }
    }
    return nullptr;
}

// whether the series computes a product; how repack.cpp interleaves is what ggml_repack_get_optimal_repack_type says
static bool taken(const ggml_tensor * result) {
    const ggml_type type   = result->src[0]->type;
    if (!ggml_is_quantized(type)) {
        return ggml_small_batch_floats(result);
    }
    const bool      eight  = ggml_cpu_has_matmul_int8();
    const bool      sve256 = eight && ggml_cpu_has_sve() && ggml_cpu_get_sve_cnt() == 32;
    const bool      narrow = type == GGML_TYPE_Q8_0 || (type == GGML_TYPE_Q4_0 && !sve256);
    const auto      size   = result->op == GGML_OP_MUL_MAT ? ggml_small_batch_repacked_size : ggml_small_batch_expert_size;
    return size(result, eight ? 8 : 4, narrow ? 4 : 8) != 0;
}

// [n, rows] of rows [first, first + n) of x, or [n, USED, rows] where ids choose among experts
static std::vector<float> product(ggml_backend_t backend, ggml_tensor * weights, const std::vector<float> & x, const std::vector<int> & ids,
                                  int first, int n, bool * ours = nullptr) {
    const int64_t  length = weights->ne[0];
    ggml_context * context = new_context();
    ggml_tensor *  b = nullptr, * choice = nullptr, * result = nullptr;
    if (weights->ne[2] > 1) {
        b      = ggml_new_tensor_3d(context, GGML_TYPE_F32, length, 1, n);
        choice = ggml_new_tensor_2d(context, GGML_TYPE_I32, USED, n);
        result = ggml_mul_mat_id(context, weights, b, choice);
    } else {
        b      = ggml_new_tensor_2d(context, GGML_TYPE_F32, length, n);
        result = ggml_mul_mat(context, weights, b);
    }
    if (ours) {
        *ours = *ours && taken(result);
    }
    ggml_cgraph * graph = ggml_new_graph(context);
    ggml_build_forward_expand(graph, result);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(context, backend);
    ggml_backend_tensor_set(b, x.data() + first * length, 0, ggml_nbytes(b));
    if (choice) {
        ggml_backend_tensor_set(choice, ids.data() + first * USED, 0, ggml_nbytes(choice));
    }
    ggml_backend_graph_compute(backend, graph);
    std::vector<float> out(ggml_nelements(result));
    ggml_backend_tensor_get(result, out.data(), 0, ggml_nbytes(result));
    ggml_backend_buffer_free(buffer);
    ggml_free(context);
    return out;
}

static bool check(ggml_backend_t backend, ggml_backend_buffer_type_t place, ggml_type type, int64_t length, int64_t rows, int experts) {
    const std::vector<float> values = random_values(length * rows * experts), x = random_values(length * MOST);
    std::vector<char>        blocks(ggml_row_size(type, length) * rows * experts);
    ggml_quantize_chunk(type, values.data(), blocks.data(), 0, rows * experts, length, nullptr);
    ggml_context *        context = new_context();
    ggml_tensor *         weights = ggml_new_tensor_3d(context, type, length, rows, experts);
    ggml_backend_buffer_t buffer  = ggml_backend_alloc_ctx_tensors_from_buft(context, place);
    ggml_backend_tensor_set(weights, blocks.data(), 0, blocks.size());

    std::vector<int> ids;
    for (int i = 0; i < MOST; i++) {  // most rows meet at the first two experts, and many name the first one twice
        ids.push_back(i % 5 == 4 ? 2 : 0);
        ids.push_back(i % 7 == 6 ? 3 : i % 3 == 2 ? 1 : 0);
    }
    const int64_t size = experts > 1 ? USED * rows : rows;
    std::vector<float> alone;
    for (int i = 0; i < MOST; i++) {
        const std::vector<float> one = product(backend, weights, x, ids, i, 1);
        alone.insert(alone.end(), one.begin(), one.end());
    }
    bool   equal = true, ours = !ggml_is_quantized(type) || weights->extra != nullptr;
    double error = 0;
    for (int n = 2; n <= MOST; n++) {
        const std::vector<float> batch = product(backend, weights, x, ids, 0, n, &ours);
        equal = equal && memcmp(batch.data(), alone.data(), batch.size() * sizeof(float)) == 0;
    }
    for (int64_t i = 0; i < MOST * size; i++) {  // that they are products at all
        const int64_t row = i / size, expert = experts > 1 ? ids[i / rows] : 0;
        double        exact = 0;
        for (int64_t k = 0; k < length; k++) {
            exact += (double) values[(expert * rows + i % rows) * length + k] * x[row * length + k];
        }
        error += (alone[i] - exact) * (alone[i] - exact) / (MOST * size * length);
    }
    equal = equal && std::sqrt(error) < 0.2;
    printf("%s(%s,length=%d,rows=%d): %s\n", experts > 1 ? "MUL_MAT_ID" : "MUL_MAT", ggml_type_name(type), (int) length, (int) rows,
           !equal ? "DIFFERENT" : ours ? "OK" : "LEFT ALONE");
    ggml_backend_buffer_free(buffer);
    ggml_free(context);
    return equal && ours;
}

int main() {
    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, 2);
    ggml_backend_buffer_type_t repack = repack_buffer_type(backend);
    int failed = repack ? 0 : 1;
    for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K }) {
        for (int64_t length : { 256, 768 }) {
            for (int64_t rows : { 8, 40 }) {
                failed += repack && !check(backend, repack, type, length, rows, 1);
                failed += repack && !check(backend, repack, type, length, rows, EXPERTS);
            }
        }
    }
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 }) {
        for (int64_t length : { 131, 1030 }) {
            for (int64_t rows : { 7, 40 }) {
                failed += !check(backend, ggml_backend_cpu_buffer_type(), type, length, rows, 1);
                failed += !check(backend, ggml_backend_cpu_buffer_type(), type, length, rows, EXPERTS);
            }
        }
    }
    ggml_backend_free(backend);
    return failed;
}
