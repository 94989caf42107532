// The body of ELAN for inference.
namespace NAMESPACE {

// The modules, and what all of them have in common. For each group of channels: the edge of its windows, memory for
// shared queries or null, and for each module its projection.
struct Body {
    Map size;
    long hidden, groups;
    const int64_t *edges;
    float *const *queries;
    const Module *modules;
    const Projection *projections;
    long count;
};

enum Stage { FEATURES, ATTENTION, PROJECTION, STAGES };

// A module reads one map, `in`, and writes another. Features read the rows of `in` beside their own. Attention then writes
// its result over `in`: in its own rows and, where windows are shifted, down to the middle of the next band, or of the
// first one. A projection needs all windows that lie in its rows; and what a stage needs has read what the stage writes.
INLINE Needs needs_of(const Body &body, long stage) {
    const bool shifted = body.modules[stage / STAGES].shifted;
    switch (stage % STAGES) {
    case FEATURES: return {BESIDE, BESIDE};
    case ATTENTION: return {BESIDE, shifted ? ROUND : BESIDE};
    default: return {shifted ? ROUND : NONE, NONE};
    }
}

static void run_piece(const Body &body, const Piece &piece, long pieces, float *in, float *out, float *scratch) {
    const Map &size = body.size;
    const Module &module = body.modules[piece.stage / STAGES];
    if (piece.stage % STAGES == FEATURES)
        return features(in, out, size, piece.begin, piece.end, body.hidden, module.weights0, module.bias0,
                        module.weights1, module.bias1, scratch);
    if (piece.stage % STAGES == PROJECTION)
        return product_of_rows<ADD>(in + piece.begin * size.row(), size, piece.end - piece.begin, module.out_weights,
                                    module.out_bias, size.c, out + piece.begin * size.row(), scratch);
    const long d = size.c / body.groups;
    for (long g = 0; g < body.groups; g++) {
        const Windows windows = {size, body.edges[g], module.shifted ? body.edges[g] / 2 : 0};
        const Projection &projection = body.projections[piece.stage / STAGES * body.groups + g];
        windows.each(piece, pieces, [&](long task) {
            attend(out, in + g * d * size.pitch, body.queries[g], module.shares, windows, task, d, projection, scratch);
        });
    }
}

// Run the modules on map x; the result is in `other` if their number is odd, else in x.
static void run_body(const Body &body, float *x, float *other, const Split &split, float *scratch, long each) {
    in_bands(body.size, split, body.count * STAGES, [&](long stage) { return needs_of(body, stage); },
             [&](const Piece &piece, long thread) {
                 const bool odd = piece.stage / STAGES % 2;
                 run_piece(body, piece, split.pieces, odd ? other : x, odd ? x : other, scratch + thread * each);
             });
}

}  // namespace NAMESPACE
