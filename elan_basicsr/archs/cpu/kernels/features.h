// Local feature extraction, for inference.
namespace NAMESPACE {

// out = x + the local features of x, in rows first to last. Three rows of the widened map follow the output down.
static void features(const float *x, float *out, const Map &size, long first, long last, long hidden,
                     const float *weights0, const float *bias0, const float *weights1, const float *bias1,
                     float *scratch) {
    const long row = size.row(), ring_row = hidden * size.pitch;
    float *packed = scratch, *ring = packed + hidden * PIXELS;
    long ready = first > 0 ? first - 1 : 0;
    for (long y = first; y < last; y++) {
        for (; ready < smaller(y + 2, size.h); ready++)
            for (long u = 0; u < size.vectors(); u += V) {
                const long vectors = smaller(V, size.vectors() - u);
                pack_shifted<false>(rows_at(x, size, ready), size.pitch, size.c, size.w, u, vectors, packed, PIXELS);
                product<RELU>(vectors, packed, PIXELS, weights0, bias0, size.c, hidden,
                              ring + ready % 3 * ring_row + u * LANES, size.pitch);
            }
        const Rows near = {y ? ring + (y + 2) % 3 * ring_row : nullptr, ring + y % 3 * ring_row,
                           y < size.h - 1 ? ring + (y + 1) % 3 * ring_row : nullptr};
        for (long u = 0; u < size.vectors(); u += V) {
            const long vectors = smaller(V, size.vectors() - u);
            pack_shifted<false>(near, size.pitch, hidden, size.w, u, vectors, packed, PIXELS);
            float *to = out + y * row + u * LANES;
            copy_lines(x + y * row + u * LANES, size.pitch, to, size.pitch, size.c, vectors);
            product<ADD>(vectors, packed, PIXELS, weights1, bias1, hidden, size.c, to, size.pitch);
        }
    }
}

}  // namespace NAMESPACE
