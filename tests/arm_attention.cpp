// Flash attention of up to 90 queries on ARM beside each of them alone, equal to the last bit with any number of threads and in
// other cells, and near the exact sums. `make check-arm` builds and runs it under emulation.

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

using floats = std::vector<float>;

static const int KEYS = 150, HEADS = 4, QUERIES = 90;
static std::mt19937 engine(7);

static floats random_values(size_t n) {
    std::normal_distribution<float> normal;
    floats values(n);
    for (float & x : values) {
        x = normal(engine);
    }
    return values;
}

struct attention {
    ggml_type type;
    int64_t   width, kv_heads;
    floats    q, k, v;
};

// Key i lies in cell i * step; the cells between hold what would be noticed if it were seen.
static ggml_tensor * cells(ggml_context * context, const attention & a, int step) {
    return ggml_new_tensor_3d(context, a.type, a.width, a.kv_heads, KEYS * step);
}

static void fill(ggml_tensor * t, const attention & a, const floats & values, int step) {
    const int64_t size = a.width * a.kv_heads;
    floats        x(KEYS * step * size, 100.0f);
    for (int i = 0; i < KEYS; i++) {
        memcpy(&x[i * step * size], &values[i * size], size * sizeof(float));
    }
    std::vector<char> blocks(ggml_nbytes(t));
    if (a.type == GGML_TYPE_F32) {
        memcpy(blocks.data(), x.data(), blocks.size());
    } else {
        ggml_quantize_chunk(a.type, x.data(), blocks.data(), 0, KEYS * step * a.kv_heads, a.width, nullptr);
    }
    ggml_backend_tensor_set(t, blocks.data(), 0, blocks.size());
}

// whether query i sees a key: a window of 70 keys
static bool sees(int i, int key) {
    const int now = KEYS - QUERIES + i;
    return key <= now && key > now - 70;
}

// [width, HEADS, n] of queries [first, first + n)
static floats attend(const attention & a, int threads, int first, int n, int step) {
    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, threads);
    ggml_context * context = ggml_init({ 1 << 20, nullptr, true });
    ggml_tensor *  q = ggml_new_tensor_3d(context, GGML_TYPE_F32, a.width, HEADS, n);
    ggml_tensor *  k = cells(context, a, step), * v = cells(context, a, step);
    ggml_tensor *  mask   = ggml_new_tensor_2d(context, GGML_TYPE_F16, KEYS * step, n);
    const auto     seen   = [&](ggml_tensor * t) { return ggml_permute(context, t, 0, 2, 1, 3); };
    ggml_tensor *  result = ggml_flash_attn_ext(context, seen(q), seen(k), seen(v), mask, 0.125f, 0.0f, 0.0f);
    ggml_cgraph *  graph  = ggml_new_graph(context);
    ggml_build_forward_expand(graph, result);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(context, backend);
    ggml_backend_tensor_set(q, &a.q[first * HEADS * a.width], 0, ggml_nbytes(q));
    fill(k, a, a.k, step);
    fill(v, a, a.v, step);
    std::vector<ggml_fp16_t> masks(KEYS * step * n);
    for (int i = 0; i < n; i++) {
        for (int cell = 0; cell < KEYS * step; cell++) {
            const bool of_key = cell % step == 0 && sees(first + i, cell / step);
            masks[i * KEYS * step + cell] = ggml_fp32_to_fp16(of_key ? 0.0f : -INFINITY);
        }
    }
    ggml_backend_tensor_set(mask, masks.data(), 0, ggml_nbytes(mask));
    ggml_backend_graph_compute(backend, graph);
    floats out(ggml_nelements(result));
    ggml_backend_tensor_get(result, out.data(), 0, ggml_nbytes(result));
    ggml_backend_buffer_free(buffer);
    ggml_free(context);
    ggml_backend_free(backend);
    return out;
}

// the root of the mean square of the errors of all queries
static double error(const attention & a, const floats & found) {
    double total = 0;
    for (int i = 0; i < QUERIES * HEADS; i++) {
        const int64_t kv_head = i % HEADS / (HEADS / a.kv_heads);
        double        sum     = 0;
        std::vector<double> out(a.width);
        for (int key = 0; key < KEYS; key++) {
            if (!sees(i / HEADS, key)) {
                continue;
            }
            const int64_t at = (key * a.kv_heads + kv_head) * a.width;
            double        x  = 0;
            for (int64_t d = 0; d < a.width; d++) {
                x += (double) a.q[i * a.width + d] * a.k[at + d];
            }
            const double weight = std::exp(0.125 * x);
            sum += weight;
            for (int64_t d = 0; d < a.width; d++) {
                out[d] += weight * a.v[at + d];
            }
        }
        for (int64_t d = 0; d < a.width; d++) {
            total += std::pow(found[i * a.width + d] - out[d] / sum, 2) / (QUERIES * HEADS * a.width);
        }
    }
    return std::sqrt(total);
}

static bool check(ggml_type type, int64_t width, int64_t kv_heads) {
    const size_t    size = KEYS * kv_heads * width;
    const attention a    = { type, width, kv_heads, random_values(QUERIES * HEADS * width), random_values(size), random_values(size) };
    floats alone;
    for (int i = 0; i < QUERIES; i++) {
        const floats one = attend(a, 1, i, 1, 1);
        alone.insert(alone.end(), one.begin(), one.end());
    }
    const double limit = type == GGML_TYPE_F32 ? 1e-6 : type == GGML_TYPE_F16 ? 1e-3 : 0.05;
    bool         equal = error(a, alone) < limit;
    for (const int n : { 2, 17, 40, QUERIES }) {
        for (const int threads : { 1, 3 }) {
            equal = equal && memcmp(attend(a, threads, QUERIES - n, n, 1).data(), &alone[(QUERIES - n) * HEADS * width], n * HEADS * width * sizeof(float)) == 0;
        }
    }
    equal = equal && attend(a, 2, 0, QUERIES, 5) == alone && attend(a, 9, 0, 1, 5) == attend(a, 1, 0, 1, 1);
    printf("ATTENTION(%s,width=%d,kv_heads=%d): %s\n", ggml_type_name(type), (int) width, (int) kv_heads, equal ? "OK" : "DIFFERENT");
    return equal;
}

int main() {
    int failed = 0;
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0 }) {
        for (int64_t kv_heads : { 1, 2 }) {
            failed += !check(type, 96, kv_heads);
        }
    }
    return failed;
}
