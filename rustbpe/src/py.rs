//! The border to Python: `nanochat_jax._rustbpe`.

use std::mem::{Discriminant, discriminant};
use std::num::NonZero;
use std::path::PathBuf;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyIterator, PyString};

use crate::merge::check_vocab_size;
use crate::{
    Batch, Error, Intake, ParquetText, Progress, Result, Splitter, count_chunks, merge_ranks,
};

/// How often signals are looked for and the progress callback is called.
const WATCH_EVERY: Duration = Duration::from_millis(100);

/// Documents of a Python iterator. The exception that ends it early waits in `exception`.
struct PythonText<'a> {
    texts: Py<PyIterator>,
    intake: &'a mut Intake,
    exception: &'a mut Option<PyErr>,
}

impl PythonText<'_> {
    fn fill(&mut self, py: Python<'_>, batch: &mut Batch) -> PyResult<()> {
        let texts = self.texts.bind(py);
        while !batch.is_full() && !self.intake.is_satisfied() {
            let Some(document) = texts.clone().next().transpose()? else { break };
            let text = document_text(&document, self.intake.documents)?;
            self.intake.add(text, batch);
        }
        Ok(())
    }
}

impl Iterator for PythonText<'_> {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut batch = Batch::default();
        match Python::attach(|py| self.fill(py, &mut batch)) {
            Ok(()) => (!batch.is_empty()).then_some(Ok(batch)),
            Err(exception) => {
                *self.exception = Some(exception);
                Some(Err(Error::Stopped))
            }
        }
    }
}

fn document_text<'a>(document: &'a Bound<'_, PyAny>, index: u64) -> PyResult<&'a str> {
    let Ok(text) = document.cast::<PyString>() else {
        let kind = document.get_type().name()?;
        return Err(PyValueError::new_err(format!("document {index} is of type {kind}, not str")));
    };
    text.to_str().map_err(|_| {
        PyValueError::new_err(format!(
            "document {index} is not valid Unicode: it has a lone surrogate, which UTF-8 cannot hold"
        ))
    })
}

/// Looks for Ctrl-C and calls `progress(stage, done, total)`: every `WATCH_EVERY`, when a stage begins
/// and when the last one ends.
struct Watcher {
    progress: Option<Py<PyAny>>,
    max_chars: u64,
    last: Instant,
    stage: Option<Discriminant<Progress>>,
    exception: Option<PyErr>,
}

impl Watcher {
    fn look(&mut self, now: Progress) -> bool {
        let is_first = self.stage.replace(discriminant(&now)) != Some(discriminant(&now));
        let is_last = matches!(now, Progress::Merging { done, total } if done == total);
        if !is_first && !is_last && self.last.elapsed() < WATCH_EVERY {
            return true;
        }
        let outcome = Python::attach(|py| {
            py.check_signals()?;
            match (&self.progress, now) {
                (Some(progress), Progress::Counting { chars }) => {
                    progress.call1(py, ("count", chars, self.max_chars)).map(drop)
                }
                (Some(progress), Progress::Merging { done, total }) => {
                    progress.call1(py, ("merge", done, total)).map(drop)
                }
                (None, _) => Ok(()),
            }
        });
        self.last = Instant::now();
        self.exception = outcome.err();
        self.exception.is_none()
    }
}

struct Trained {
    ranks: Vec<Vec<u8>>,
    chunks: usize,
    count_seconds: f64,
    merge_seconds: f64,
}

fn train_from(
    source: &mut dyn Iterator<Item = Result<Batch>>,
    splitter: &Splitter,
    vocab_size: usize,
    threads: usize,
    watcher: &mut Watcher,
) -> Result<Trained> {
    let start = Instant::now();
    let counts = count_chunks(source, splitter, threads, &mut |now| watcher.look(now))?;
    let count_seconds = start.elapsed().as_secs_f64();
    let chunks = counts.iter().map(|part| part.len()).sum();
    let ranks = merge_ranks(counts, vocab_size, &mut |now| watcher.look(now))?;
    let merge_seconds = start.elapsed().as_secs_f64() - count_seconds;
    Ok(Trained { ranks, chunks, count_seconds, merge_seconds })
}

/// Learns a byte-pair encoding; nanochat_jax/_rustbpe.pyi describes the arguments.
#[pyfunction]
#[pyo3(signature = (texts, parquet, *, column, pattern, vocab_size, doc_cap, max_chars, threads, progress))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python function")]
fn train<'py>(
    py: Python<'py>,
    texts: Option<Bound<'py, PyAny>>,
    parquet: Vec<PathBuf>,
    column: &str,
    pattern: &str,
    vocab_size: usize,
    doc_cap: Option<usize>,
    max_chars: Option<u64>,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let value_error = |error: Error| PyValueError::new_err(error.to_string());
    check_vocab_size(vocab_size).map_err(value_error)?;
    let splitter = Splitter::new(pattern).map_err(value_error)?;
    let threads = threads.unwrap_or_else(|| available_parallelism().map_or(1, NonZero::get));
    let texts = match texts {
        Some(texts) => Some(texts.try_iter()?.unbind()),
        None => None,
    };
    let mut intake = Intake::new(doc_cap, max_chars);
    let mut exception = None;
    let mut watcher = Watcher {
        progress,
        max_chars: max_chars.unwrap_or(0),
        last: Instant::now(),
        stage: None,
        exception: None,
    };
    let trained = py.detach(|| {
        let mut source: Box<dyn Iterator<Item = Result<Batch>>> = match texts {
            Some(texts) => {
                Box::new(PythonText { texts, intake: &mut intake, exception: &mut exception })
            }
            None => Box::new(ParquetText::new(&parquet, column, &mut intake)),
        };
        train_from(&mut *source, &splitter, vocab_size, threads, &mut watcher)
    });
    match (trained, exception.or(watcher.exception)) {
        (Ok(trained), _) => to_dict(py, &trained, &intake),
        (Err(Error::Stopped), Some(exception)) => Err(exception),
        (Err(error), _) => Err(value_error(error)),
    }
}

fn to_dict<'py>(
    py: Python<'py>,
    trained: &Trained,
    intake: &Intake,
) -> PyResult<Bound<'py, PyDict>> {
    let ranks: Vec<_> = trained.ranks.iter().map(|token| PyBytes::new(py, token)).collect();
    let result = PyDict::new(py);
    result.set_item("ranks", ranks)?;
    result.set_item("documents", intake.documents)?;
    result.set_item("chars", intake.chars)?;
    result.set_item("bytes", intake.bytes)?;
    result.set_item("chunks", trained.chunks)?;
    result.set_item("count_seconds", trained.count_seconds)?;
    result.set_item("merge_seconds", trained.merge_seconds)?;
    Ok(result)
}

#[pymodule]
fn _rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(train, module)?)
}
