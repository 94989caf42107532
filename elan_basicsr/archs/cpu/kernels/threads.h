// The threads of a call. They sleep until there is work: OpenMP's stay awake for some milliseconds, in which they use up
// the time of a core that another program wants, and have lost it when the next call comes.

// A call under way: run(of, number) for the numbers from 0, that of the caller, as many as there are threads at most.
struct Call {
    void (*run)(void *of, long number);
    void *of;
    long threads, numbers, inside;
    Call *next;
};

class Threads {
public:
    // Run a call, with those of the threads that come before the caller has done all of it.
    void run(Call &call) {
        pthread_mutex_lock(&lock);
        wanted += call.threads - 1;
        if (wanted > started) start(call.threads);
        call.next = open, open = &call;
        for (long i = 1; i < call.threads; i++) pthread_cond_signal(&opened);
        pthread_mutex_unlock(&lock);
        call.run(call.of, 0);
        pthread_mutex_lock(&lock);
        Call **at = &open;
        while (*at != &call) at = &(*at)->next;
        *at = call.next, wanted -= call.threads - 1;
        while (call.inside) pthread_cond_wait(&left, &lock);
        pthread_mutex_unlock(&lock);
    }

private:
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t opened = PTHREAD_COND_INITIALIZER, left = PTHREAD_COND_INITIALIZER;
    Call *open = nullptr;
    long wanted = 0, started = 0;

    void serve() {
        pthread_mutex_lock(&lock);
        for (;;) {
            Call *call = open;
            while (call && call->numbers == call->threads) call = call->next;
            if (!call) {
                pthread_cond_wait(&opened, &lock);
                continue;
            }
            const long number = call->numbers++;
            call->inside++;
            pthread_mutex_unlock(&lock);
            call->run(call->of, number);
            pthread_mutex_lock(&lock);
            if (!--call->inside) pthread_cond_broadcast(&left);
        }
    }

    // As many more as go with a caller, each where OpenMP has its like: OMP_PROC_BIND may give each a core.
    void start(long threads) {
#pragma omp parallel num_threads(threads)
        if (omp_get_thread_num()) {
            pthread_t thread;
            sigset_t all, before;
            sigfillset(&all);
            pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the threads that Python knows
            const bool is = !pthread_create(&thread, nullptr, [](void *of) -> void * {
                ((Threads *)of)->serve();
                return nullptr;
            }, this);
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            if (is) pthread_detach(thread);
#pragma omp atomic
            started += is;
        }
    }
};

static Threads of_process;
// A fork has the memory of the threads before it and not the threads.
static const int on_fork = pthread_atfork(nullptr, nullptr, [] { new (&of_process) Threads; });

// run(number) in so many threads at most; all is done when it returns, by whichever of them.
template <class Run> INLINE void in_threads(long threads, Run run) {
    Call call = {[](void *of, long number) { (*(Run *)of)(number); }, &run, threads, 1, 0, nullptr};
    of_process.run(call);
}
