// The body of ELAN for inference. Bands of rows go through the modules at their own pace, and threads take what is ready:
// one that loses its core holds up the bands beside its own and no others.
namespace NAMESPACE {

// The modules, and what all of them have in common. For each group of channels: the edge of its windows, memory for
// shared queries or null, and for each module weights and bias of its queries and values, or of values alone.
struct Body {
    Map size;
    long hidden, groups;
    const int64_t *edges;
    float *const *queries;
    const Module *modules;
    const float *const *projections;
    long count;
};

// A band is so many rows; windows of every group fill it. A module has three stages.
enum Stage { FEATURES, ATTENTION, PROJECTION, STAGES };

struct Piece {
    long band = -1, stage = 0, number = 0;  // of `Progress::pieces`
};

class Progress {
public:
    Progress(long bands, const Body &body, long pieces)
        : pieces(pieces), bands(bands), body(body), stages(body.count * STAGES) {}

    // Take a piece back, and give out the next one of the earliest module; false where all is done.
    bool next(Piece &piece) {
        pthread_mutex_lock(&lock);
        if (piece.band >= 0 && ++bands[piece.band].back == pieces) {
            bands[piece.band] = {bands[piece.band].done + 1, 0, 0};
            pthread_cond_broadcast(&changed);
        }
        long band = choose();
        for (; band < 0 && !finished(); band = choose()) pthread_cond_wait(&changed, &lock);
        if (band >= 0) piece = {band, bands[band].done, bands[band].given++};
        pthread_mutex_unlock(&lock);
        return band >= 0;
    }

    const long pieces;  // of a stage of a band

private:
    struct Band {
        long done, given, back;  // stages; pieces of the next one
    };
    std::vector<Band> bands;
    const Body &body;
    const long stages;
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

    long choose() const {
        long chosen = -1;
        for (long b = 0; b < (long)bands.size(); b++)
            if ((chosen < 0 || bands[b].done / STAGES < bands[chosen].done / STAGES) && ready(b)) chosen = b;
        return chosen;
    }

    bool finished() const {
        for (const Band &band : bands)
            if (band.done < stages) return false;
        return true;
    }

    // Whether the bands beside this one have written what its next stage reads, and read what it writes. A module reads
    // one map, `in`, and writes another. Features read the rows of `in` beside their own. Attention then writes its
    // result over `in`: in its own rows and, where windows are shifted, down to the middle of the next band, or of the
    // first one. A projection needs all windows that lie in its rows.
    bool ready(long b) const {
        const long stage = bands[b].done;
        if (stage == stages || bands[b].given == pieces) return false;
        const bool shifted = body.modules[stage / STAGES].shifted;
        switch (stage % STAGES) {
        case FEATURES: return reached(b - 1, stage, false) && reached(b + 1, stage, false);
        case ATTENTION: return reached(b - 1, stage, false) && reached(b + 1, stage, shifted);
        default: return !shifted || reached(b - 1, stage, true);
        }
    }

    bool reached(long b, long stage, bool wraps) const {
        const long n = bands.size();
        return (b >= 0 && b < n) || wraps ? bands[(b + n) % n].done >= stage : true;
    }
};

// Run a part of a stage of a module in rows first to last of map `in`.
static void run(const Body &body, const Piece &piece, long pieces, long first, long last, float *in, float *out,
                float *scratch) {
    const Map &size = body.size;
    const Module &module = body.modules[piece.stage / STAGES];
    const long begin = first + (last - first) * piece.number / pieces;
    const long end = first + (last - first) * (piece.number + 1) / pieces;
    if (piece.stage % STAGES == FEATURES)
        return features(in, out, size, begin, end, body.hidden, module.weights0, module.bias0, module.weights1,
                        module.bias1, scratch);
    if (piece.stage % STAGES == PROJECTION)
        return add_product(in, out, size, begin, end, module.out_weights, module.out_bias);
    const long d = size.c / body.groups;
    for (long g = 0; g < body.groups; g++) {
        const Windows windows = {size, body.edges[g], module.shifted ? body.edges[g] / 2 : 0};
        const long across = windows.across(), tasks = (last - first) / windows.edge * across;
        const float *const *weights = body.projections + 2 * (piece.stage / STAGES * body.groups + g);
        for (long i = tasks * piece.number / pieces; i < tasks * (piece.number + 1) / pieces; i++)
            attend(out, in + g * d * size.pitch, body.queries[g], module.shares, windows,
                   first / windows.edge * across + i, d, weights[0], weights[1], scratch);
    }
}

// Run the modules in bands of `rows` rows on map x; the result is in `other` if their number is odd, else in x.
static void run_body(const Body &body, float *x, float *other, long rows, float *scratch, long each, long threads) {
    const long h = body.size.h, bands = (h + rows - 1) / rows;
    // Small pieces for many threads, at the price of more rows of local features that are computed twice.
    const long pieces = smaller(rows, (8 * threads + bands - 1) / bands);
    Progress progress(bands, body, pieces);
#pragma omp parallel num_threads(threads)
    {
        float *mine = scratch + omp_get_thread_num() * each;
        for (Piece piece; progress.next(piece);) {
            const long first = piece.band * rows;
            const bool odd = piece.stage / STAGES % 2;
            run(body, piece, pieces, first, smaller(first + rows, h), odd ? other : x, odd ? x : other, mine);
        }
    }
}

}  // namespace NAMESPACE
