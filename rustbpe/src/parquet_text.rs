//! Documents from one text column of Parquet files, a page at a time.

use std::fmt::Display;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use parquet::basic::Type as PhysicalType;
use parquet::column::reader::{ColumnReaderImpl, get_typed_column_reader};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::reader::{FileReader, SerializedFileReader};

use crate::{Batch, Error, Intake, Result};

/// Rows asked of the reader at once; they share the memory of their page.
const ROWS: usize = 64;

/// Batches of the documents of `column` in the order of `paths`; nulls are skipped.
pub struct ParquetText<'a> {
    column: &'a str,
    paths: std::slice::Iter<'a, PathBuf>,
    /// Of the file being read.
    path: &'a Path,
    shard: Option<Shard<'a>>,
    intake: &'a mut Intake,
    failed: bool,
}

impl<'a> ParquetText<'a> {
    pub fn new(paths: &'a [PathBuf], column: &'a str, intake: &'a mut Intake) -> Self {
        Self {
            column,
            paths: paths.iter(),
            path: Path::new(""),
            shard: None,
            intake,
            failed: false,
        }
    }

    /// The Parquet library panics on some damaged files; that too is an error of the file.
    fn fill_caught(&mut self, batch: &mut Batch) -> Result<()> {
        catch_unwind(AssertUnwindSafe(|| self.fill(batch)))
            .unwrap_or_else(|_| Err(unreadable(self.path, &"it is damaged")))
    }

    fn fill(&mut self, batch: &mut Batch) -> Result<()> {
        while !batch.is_full() && !self.intake.is_satisfied() {
            let has_more = match &mut self.shard {
                Some(shard) => shard.read(self.intake, batch)?,
                None => false,
            };
            if !has_more {
                let Some(path) = self.paths.next() else { break };
                self.path = path;
                self.shard = Some(Shard::open(path, self.column)?);
            }
        }
        Ok(())
    }
}

impl Iterator for ParquetText<'_> {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let mut batch = Batch::default();
        match self.fill_caught(&mut batch) {
            Ok(()) => (!batch.is_empty()).then_some(Ok(batch)),
            Err(error) => {
                self.failed = true;
                Some(Err(error))
            }
        }
    }
}

/// One file and how far it has been read.
struct Shard<'a> {
    path: &'a Path,
    file: SerializedFileReader<File>,
    column: usize,
    is_nullable: bool,
    next_group: usize,
    reader: Option<ColumnReaderImpl<ByteArrayType>>,
    values: Vec<ByteArray>,
    levels: Vec<i16>,
}

impl<'a> Shard<'a> {
    fn open(path: &'a Path, column: &str) -> Result<Self> {
        let file = File::open(path).map_err(|error| unreadable(path, &error))?;
        let file = SerializedFileReader::new(file).map_err(|error| unreadable(path, &error))?;
        let (column, is_nullable) = find_column(&file, path, column)?;
        Ok(Self {
            path,
            file,
            column,
            is_nullable,
            next_group: 0,
            reader: None,
            values: Vec::new(),
            levels: Vec::new(),
        })
    }

    /// Adds some rows to `batch`; false at the end of the file.
    fn read(&mut self, intake: &mut Intake, batch: &mut Batch) -> Result<bool> {
        let Some(mut reader) =
            self.reader.take().map_or_else(|| self.next_reader(), |r| Ok(Some(r)))?
        else {
            return Ok(false);
        };
        self.values.clear();
        self.levels.clear();
        let levels = self.is_nullable.then_some(&mut self.levels);
        let (rows, _, _) = reader
            .read_records(ROWS, levels, None, &mut self.values)
            .map_err(|error| self.unreadable(&error))?;
        if rows > 0 {
            self.reader = Some(reader);
        }
        for value in &self.values {
            if intake.is_satisfied() {
                break;
            }
            let document = value.as_utf8().map_err(|error| self.unreadable(&error))?;
            intake.add(document, batch);
        }
        Ok(true)
    }

    /// The text column of the next row group.
    fn next_reader(&mut self) -> Result<Option<ColumnReaderImpl<ByteArrayType>>> {
        if self.next_group >= self.file.num_row_groups() {
            return Ok(None);
        }
        let group = self.file.get_row_group(self.next_group);
        self.next_group += 1;
        let reader = group.and_then(|group| group.get_column_reader(self.column));
        let reader = reader.map_err(|error| self.unreadable(&error))?;
        Ok(Some(get_typed_column_reader(reader)))
    }

    fn unreadable(&self, error: &dyn Display) -> Error {
        let row_group = self.next_group.saturating_sub(1);
        unreadable(self.path, &format!("row group {row_group}: {error}"))
    }
}

fn unreadable(path: &Path, error: &dyn Display) -> Error {
    Error::invalid(format!("{} cannot be read as a Parquet file: {error}", path.display()))
}

/// The index of a plain text column and whether it may hold nulls.
fn find_column(
    file: &SerializedFileReader<File>,
    path: &Path,
    name: &str,
) -> Result<(usize, bool)> {
    let columns = file.metadata().file_metadata().schema_descr().columns();
    let Some(index) = columns.iter().position(|column| column.path().string() == name) else {
        let names: Vec<String> = columns.iter().map(|column| column.path().string()).collect();
        return Err(Error::invalid(format!(
            "{} has no column {name:?}; its columns are: {}",
            path.display(),
            names.join(", ")
        )));
    };
    let column = &columns[index];
    if column.physical_type() != PhysicalType::BYTE_ARRAY || column.max_rep_level() > 0 {
        return Err(Error::invalid(format!(
            "column {name:?} of {} holds {}, not one text a row",
            path.display(),
            column.physical_type()
        )));
    }
    Ok((index, column.max_def_level() > 0))
}
