// The machine's own cuBLAS where it has one, plain kernels where not: linked into libggml-cuda.so of the kit, which then
// needs nothing but the driver. On sm_90 ggml multiplies quantized weights itself (mmq.cu); cuBLAS gets products with
// more than a few rows of F32, F16 and BF16 weights. GEMMA_MTP_CUBLAS=0 leaves the machine's library alone.
#include <cublas_v2.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

struct cublasContext {
    cublasHandle_t machines;  // the handle of the machine's library, null without one
    cudaStream_t   stream;
};

namespace {

void * library() {
    static void * const opened = [] {
        const char * const said = getenv("GEMMA_MTP_CUBLAS");
        void * const found = said && !strcmp(said, "0") ? nullptr : dlopen("libcublas.so.13", RTLD_NOW | RTLD_LOCAL);
        fprintf(stderr, "gpu-kit: products of unquantized weights: %s\n", found ? "libcublas.so.13" : "plain kernels");
        return found;
    }();
    return opened;
}

template <typename F> F * machines(F *, const char * name) {
    F * const function = (F *) dlsym(library(), name);
    if (!function) {
        fprintf(stderr, "gpu-kit: libcublas.so.13 has no %s; set GEMMA_MTP_CUBLAS=0\n", name);
        abort();
    }
    return function;
}

#define MACHINES(name) static auto * const theirs = machines(name, #name)

// Column-major matrices of a batch: at pointers that lie in device memory, or `stride` elements apart.
struct Operand {
    const void *         base;
    const void * const * list;
    long long            stride;
    cudaDataType         type;
    int                  ld;
    bool                 transposed;

    __device__ float at(int batch, int row, int column) const {
        const long long index = transposed ? column + (long long) row * ld : row + (long long) column * ld;
        const void * const p = list ? list[batch] : base;
        const long long i = (list ? 0 : batch * stride) + index;
        switch (type) {
            case CUDA_R_16F:  return __half2float(((const __half *) p)[i]);
            case CUDA_R_16BF: return __bfloat162float(((const __nv_bfloat16 *) p)[i]);
            default:          return ((const float *) p)[i];
        }
    }

    __device__ void put(int batch, int row, int column, float value) const {
        void * const p = (void *) (list ? list[batch] : base);
        const long long i = (list ? 0 : batch * stride) + row + (long long) column * ld;
        switch (type) {
            case CUDA_R_16F:  ((__half *) p)[i] = __float2half(value); break;
            case CUDA_R_16BF: ((__nv_bfloat16 *) p)[i] = __float2bfloat16(value); break;
            default:          ((float *) p)[i] = value;
        }
    }
};

constexpr int TILE = 16;

// C = alpha A B + beta C, sums in F32.
__global__ void product(Operand A, Operand B, Operand C, int m, int n, int k, float alpha, float beta) {
    __shared__ float a[TILE][TILE + 1], b[TILE][TILE + 1];
    const int x = threadIdx.x, y = threadIdx.y, batch = blockIdx.z;
    const int row = blockIdx.x * TILE + x, column = blockIdx.y * TILE + y;
    float sum = 0.0f;
    for (int begin = 0; begin < k; begin += TILE) {
        // Neighbors in a warp read neighbors in memory: down a column, or along the row that is stored as one.
        const int ra = A.transposed ? y : x, ka = A.transposed ? x : y;
        const int kb = B.transposed ? y : x, cb = B.transposed ? x : y;
        const int arow = blockIdx.x * TILE + ra, bcolumn = blockIdx.y * TILE + cb;
        a[ka][ra] = arow < m && begin + ka < k ? A.at(batch, arow, begin + ka) : 0.0f;
        b[kb][cb] = bcolumn < n && begin + kb < k ? B.at(batch, begin + kb, bcolumn) : 0.0f;
        __syncthreads();
        for (int i = 0; i < TILE; i++) {
            sum += a[i][x] * b[i][y];
        }
        __syncthreads();
    }
    if (row < m && column < n) {
        C.put(batch, row, column, alpha * sum + (beta != 0.0f ? beta * C.at(batch, row, column) : 0.0f));
    }
}

bool known(const Operand & operand) {
    return operand.type == CUDA_R_32F || operand.type == CUDA_R_16F || operand.type == CUDA_R_16BF;
}

float scalar(const void * value, cublasComputeType_t compute) {
    return compute == CUBLAS_COMPUTE_16F ? __half2float(*(const __half *) value) : *(const float *) value;
}

cublasStatus_t multiply(cublasHandle_t handle, Operand A, Operand B, Operand C, int m, int n, int k,
                        const void * alpha, const void * beta, cublasComputeType_t compute, int count) {
    if (!known(A) || !known(B) || !known(C) || count > 65535 || n > 65535 * TILE) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    const dim3 blocks((m + TILE - 1) / TILE, (n + TILE - 1) / TILE, count);
    product<<<blocks, dim3(TILE, TILE), 0, handle->stream>>>(
        A, B, C, m, n, k, scalar(alpha, compute), scalar(beta, compute));
    return cudaPeekAtLastError() == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

}  // namespace

extern "C" {

const char * cublasGetStatusString(cublasStatus_t status) {
    switch (status) {
        case CUBLAS_STATUS_SUCCESS:       return "success";
        case CUBLAS_STATUS_NOT_SUPPORTED: return "the kit's stand-in for cuBLAS does not have this product";
        default:                          return "cuBLAS failed";
    }
}

cublasStatus_t cublasCreate(cublasHandle_t * handle) {
    *handle = new cublasContext{};
    if (!library()) {
        return CUBLAS_STATUS_SUCCESS;
    }
    MACHINES(cublasCreate_v2);
    return theirs(&(*handle)->machines);
}

cublasStatus_t cublasDestroy(cublasHandle_t handle) {
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    if (handle->machines) {
        MACHINES(cublasDestroy_v2);
        status = theirs(handle->machines);
    }
    delete handle;
    return status;
}

cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream) {
    handle->stream = stream;
    if (!handle->machines) {
        return CUBLAS_STATUS_SUCCESS;
    }
    MACHINES(cublasSetStream_v2);
    return theirs(handle->machines, stream);
}

cublasStatus_t cublasSetWorkspace(cublasHandle_t handle, void * workspace, size_t size) {
    if (!handle->machines) {
        return CUBLAS_STATUS_SUCCESS;
    }
    MACHINES(cublasSetWorkspace_v2);
    return theirs(handle->machines, workspace, size);
}

cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
    if (!handle->machines) {
        return CUBLAS_STATUS_SUCCESS;
    }
    MACHINES(cublasSetMathMode);
    return theirs(handle->machines, mode);
}

cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,
    const void * alpha, const void * A, cudaDataType Atype, int lda, long long int strideA,
    const void * B, cudaDataType Btype, int ldb, long long int strideB,
    const void * beta, void * C, cudaDataType Ctype, int ldc, long long int strideC, int count,
    cublasComputeType_t compute, cublasGemmAlgo_t algo) {
    if (handle->machines) {
        MACHINES(cublasGemmStridedBatchedEx);
        return theirs(handle->machines, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb, strideB,
                      beta, C, Ctype, ldc, strideC, count, compute, algo);
    }
    return multiply(handle, {A, nullptr, strideA, Atype, lda, transa != CUBLAS_OP_N},
                    {B, nullptr, strideB, Btype, ldb, transb != CUBLAS_OP_N},
                    {C, nullptr, strideC, Ctype, ldc, false}, m, n, k, alpha, beta, compute, count);
}

cublasStatus_t cublasGemmBatchedEx(
    cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,
    const void * alpha, const void * const A[], cudaDataType Atype, int lda, const void * const B[],
    cudaDataType Btype, int ldb, const void * beta, void * const C[], cudaDataType Ctype, int ldc, int count,
    cublasComputeType_t compute, cublasGemmAlgo_t algo) {
    if (handle->machines) {
        MACHINES(cublasGemmBatchedEx);
        return theirs(handle->machines, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype,
                      ldc, count, compute, algo);
    }
    return multiply(handle, {nullptr, A, 0, Atype, lda, transa != CUBLAS_OP_N},
                    {nullptr, B, 0, Btype, ldb, transb != CUBLAS_OP_N},
                    {nullptr, C, 0, Ctype, ldc, false}, m, n, k, alpha, beta, compute, count);
}

// The rest are these two with one matrix, or with F32 throughout.

cublasStatus_t cublasGemmEx(
    cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,
    const void * alpha, const void * A, cudaDataType Atype, int lda, const void * B, cudaDataType Btype, int ldb,
    const void * beta, void * C, cudaDataType Ctype, int ldc, cublasComputeType_t compute, cublasGemmAlgo_t algo) {
    if (handle->machines) {
        MACHINES(cublasGemmEx);
        return theirs(handle->machines, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype,
                      ldc, compute, algo);
    }
    return cublasGemmStridedBatchedEx(handle, transa, transb, m, n, k, alpha, A, Atype, lda, 0, B, Btype, ldb, 0,
                                      beta, C, Ctype, ldc, 0, 1, compute, algo);
}

cublasStatus_t cublasSgemm(
    cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,
    const float * alpha, const float * A, int lda, const float * B, int ldb, const float * beta, float * C, int ldc) {
    if (handle->machines) {
        MACHINES(cublasSgemm_v2);
        return theirs(handle->machines, transa, transb, m, n, k, alpha, A, lda, B, ldb, beta, C, ldc);
    }
    return cublasSgemmStridedBatched(handle, transa, transb, m, n, k, alpha, A, lda, 0, B, ldb, 0, beta, C, ldc, 0, 1);
}

cublasStatus_t cublasSgemmStridedBatched(
    cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,
    const float * alpha, const float * A, int lda, long long int strideA, const float * B, int ldb,
    long long int strideB, const float * beta, float * C, int ldc, long long int strideC, int count) {
    return cublasGemmStridedBatchedEx(handle, transa, transb, m, n, k, alpha, A, CUDA_R_32F, lda, strideA, B,
                                      CUDA_R_32F, ldb, strideB, beta, C, CUDA_R_32F, ldc, strideC, count,
                                      CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

cublasStatus_t cublasSgemmBatched(
    cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,
    const float * alpha, const float * const A[], int lda, const float * const B[], int ldb,
    const float * beta, float * const C[], int ldc, int count) {
    return cublasGemmBatchedEx(handle, transa, transb, m, n, k, alpha, (const void * const *) A, CUDA_R_32F, lda,
                               (const void * const *) B, CUDA_R_32F, ldb, beta, (void * const *) C, CUDA_R_32F, ldc,
                               count, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

// No Gemma graph solves a triangular system.
cublasStatus_t cublasStrsmBatched(
    cublasHandle_t handle, cublasSideMode_t side, cublasFillMode_t fill, cublasOperation_t trans, cublasDiagType_t diag,
    int m, int n, const float * alpha, const float * const A[], int lda, float * const B[], int ldb, int count) {
    if (!handle->machines) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    MACHINES(cublasStrsmBatched);
    return theirs(handle->machines, side, fill, trans, diag, m, n, alpha, A, lda, B, ldb, count);
}

}
