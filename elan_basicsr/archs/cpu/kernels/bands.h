// Work in bands of rows, which go through the stages of a computation at their own pace: threads take what is ready, so
// that one that loses its core holds up the bands beside its own and no others.
namespace NAMESPACE {

// Rows of a band, in how many pieces each of its stages is handed out, and how many threads take them.
struct Split {
    long rows, pieces, threads;
};

// Which bands of the same image must have gone as far before a stage begins: with ROUND the last is above the first.
enum Side { NONE, BESIDE, ROUND };
struct Needs {
    Side above, below;
};

// A piece of a stage of a band: rows `begin` to `end` of all images' `first` to `last`. Slots number the pieces of a stage.
struct Piece {
    long band = -1, stage = 0, number = 0, first = 0, last = 0, begin = 0, end = 0, slot = 0;
};

template <class NeedsOf> class Progress {
public:
    Progress(const Map &size, const Split &split, long stages, NeedsOf needs)
        : size(size), split(split), stages(stages), needs(needs), of_image((size.h + split.rows - 1) / split.rows),
          bands(size.b * of_image) {}

    // Take a piece back and give out the next one, of the earliest stages; false where all is done.
    bool next(Piece &piece) {
        pthread_mutex_lock(&lock);
        if (piece.band >= 0 && ++bands[piece.band].back == split.pieces) {
            bands[piece.band] = {bands[piece.band].done + 1, 0, 0};
            pthread_cond_broadcast(&changed);
        }
        long band = choose();
        for (; band < 0 && !finished(); band = choose()) pthread_cond_wait(&changed, &lock);
        if (band >= 0) piece = piece_of(band, bands[band].given++);
        pthread_mutex_unlock(&lock);
        return band >= 0;
    }

private:
    struct Band {
        long done, given, back;  // stages; pieces of the next one
    };
    const Map size;
    const Split split;
    const long stages;
    const NeedsOf needs;
    const long of_image;
    std::vector<Band> bands;
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

    // Three stages are about as much as stays in the cache from one to the next.
    long choose() const {
        long chosen = -1;
        for (long b = 0; b < (long)bands.size(); b++)
            if ((chosen < 0 || bands[b].done / 3 < bands[chosen].done / 3) && ready(b)) chosen = b;
        return chosen;
    }

    bool finished() const {
        for (const Band &band : bands)
            if (band.done < stages) return false;
        return true;
    }

    bool ready(long b) const {
        const long stage = bands[b].done;
        if (stage == stages || bands[b].given == split.pieces) return false;
        const Needs need = needs(stage);
        const long place = b % of_image, last = of_image - 1, top = b - place;
        return (need.above == NONE || (!place && need.above == BESIDE) ||
                bands[place ? b - 1 : top + last].done >= stage) &&
               (need.below == NONE || (place == last && need.below == BESIDE) ||
                bands[place < last ? b + 1 : top].done >= stage);
    }

    Piece piece_of(long band, long number) const {
        const long image = band / of_image * size.h, first = image + band % of_image * split.rows;
        const long last = smaller(first + split.rows, image + size.h);
        return {band, bands[band].done, number, first, last, first + (last - first) * number / split.pieces,
                first + (last - first) * (number + 1) / split.pieces, band * split.pieces + number};
    }
};

// Call run(piece, its thread) for all pieces of all stages; needs(stage) tells what a stage needs of the one before, the
// first one of nothing.
template <class NeedsOf, class Run>
INLINE void in_bands(const Map &size, const Split &split, long stages, NeedsOf needs, Run run) {
    Progress<NeedsOf> progress(size, split, stages, needs);
    in_threads(split.threads, [&](long thread) {
        for (Piece piece; progress.next(piece);) run(piece, thread);
    });
}

}  // namespace NAMESPACE
