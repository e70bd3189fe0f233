//! The threads: those of the host program if it lends them, else rayon workers; the calling thread
//! always takes part.
//!
//! Work is a list of tasks fixed by the problem alone; threads take the next task from the list. No
//! task's result depends on which thread ran it, so results never depend on the number of threads.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Pools by (process, helpers). The process is part of the key because a forked child (a data-loader
/// worker, say) inherits this table but none of its threads.
type Pools = Mutex<HashMap<(u32, usize), Arc<ThreadPool>>>;

fn pool(helpers: usize) -> Option<Arc<ThreadPool>> {
    static POOLS: OnceLock<Pools> = OnceLock::new();
    let mut pools = POOLS.get_or_init(Pools::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = pools.get(&(std::process::id(), helpers)) {
        return Some(Arc::clone(found));
    }
    let built = ThreadPoolBuilder::new()
        .num_threads(helpers)
        .thread_name(|i| format!("ferrolora-{i}"))
        .build()
        // A process that may start no more threads still gets its answer, from the calling thread.
        .ok()
        .map(Arc::new)?;
    pools.insert((std::process::id(), helpers), Arc::clone(&built));
    Some(built)
}

/// Runs a piece of work on each of a number of threads, the calling one included, and returns when all
/// have finished; or returns false, having run nothing.
pub type Team = fn(threads: usize, work: &(dyn Fn() + Sync)) -> bool;

static HOST: OnceLock<Team> = OnceLock::new();

/// Lends the host program's threads. A host whose own threads wait actively for its next operation
/// would otherwise keep a core from ours. The first call decides; later ones change nothing.
pub fn use_host_threads(team: Team) {
    let _decided_before = HOST.set(team);
}

/// Runs `work` on every task, on at most `threads` threads, the calling one included.
///
/// # Panics
/// If `work` panics.
pub fn for_each<T: Send>(threads: usize, tasks: Vec<T>, work: impl Fn(T) + Sync) {
    if threads <= 1 || tasks.len() <= 1 {
        tasks.into_iter().for_each(work);
        return;
    }
    let queue = Mutex::new(tasks.into_iter());
    let drain = || {
        loop {
            // The lock is released before the task runs: `next` cannot panic, `work` may.
            let task = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            match task {
                Some(task) => work(task),
                None => return,
            }
        }
    };
    // Always the same number of threads, even for fewer tasks: a team that changes its size is rebuilt.
    if HOST.get().is_some_and(|team| team(threads, &drain)) {
        return;
    }
    let Some(pool) = pool(threads - 1) else { return drain() };
    pool.in_place_scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| drain());
        }
        drain();
    });
}

/// Splits each row of a row-major matrix at the same columns: element `t` of the result holds, for
/// every row, the columns `t*width .. (t+1)*width`. Tasks that own column ranges write through it.
///
/// # Panics
/// If `width` is 0, or `matrix` is not a whole number of rows.
pub(crate) fn split_columns<E>(matrix: &mut [E], cols: usize, width: usize) -> Vec<Vec<&mut [E]>> {
    assert!(width > 0, "a column range has at least one column");
    if cols == 0 {
        return Vec::new();
    }
    assert_eq!(matrix.len() % cols, 0, "whole rows");
    let rows = matrix.len() / cols;
    let mut ranges: Vec<Vec<&mut [E]>> = (0..cols.div_ceil(width)).map(|_| Vec::with_capacity(rows)).collect();
    for row in matrix.chunks_mut(cols) {
        for (range, part) in ranges.iter_mut().zip(row.chunks_mut(width)) {
            range.push(part);
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::{for_each, split_columns};
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_task_runs_exactly_once_on_any_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            for tasks in [0, 1, 2, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for_each(threads, (0..tasks).collect(), |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn column_ranges_cover_every_element_of_every_row() {
        let mut matrix: Vec<usize> = (0..3 * 7).collect();
        let ranges = split_columns(&mut matrix, 7, 3);
        assert_eq!(ranges.len(), 3);
        assert_eq!(ranges[0][1], [7, 8, 9]);
        assert_eq!(ranges[2][2], [20]);
    }

    #[test]
    #[should_panic(expected = "task 5")]
    fn a_panic_in_a_task_reaches_the_caller() {
        for_each(2, (0..8).collect(), |i| assert!(i != 5, "task 5"));
    }
}
