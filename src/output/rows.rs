//! Rows that lie somewhere in memory, checked once.

use half::f16;
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};
use crate::prompt::{SequencePlan, Slot};

/// Rows lent to a writer, shape `[R, H]`, row-major, fp16: one image's features, or a whole sequence.
///
/// The shape is checked when it is made, so that no writer has to.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    values: &'a [f16], // [R, H]
    hidden: usize,     // H
}

impl<'a> Rows<'a> {
    /// Takes `values` as rows of `hidden` elements.
    ///
    /// # Errors
    /// [`Error::Argument`] if `hidden` is 0 or `values` are not whole rows.
    ///
    /// # Examples
    /// ```
    /// use imagehere::output::Rows;
    ///
    /// let values = [half::f16::ONE; 6];
    /// assert_eq!(Rows::new(&values, 3)?.len(), 2);
    /// assert!(Rows::new(&values, 4).is_err());
    /// # Ok::<(), imagehere::Error>(())
    /// ```
    pub fn new(values: &'a [f16], hidden: usize) -> Result<Self> {
        if hidden == 0 || !values.len().is_multiple_of(hidden) {
            return Err(Error::argument(
                format!("{} elements are no whole rows of {hidden}", values.len()),
                "Give all elements of every row, and how many a row has",
            ));
        }
        Ok(Self { values, hidden })
    }

    /// As [`Rows::new`], of values that are known to be whole rows.
    pub(crate) fn checked(values: &'a [f16], hidden: usize) -> Self {
        debug_assert!(hidden > 0 && values.len().is_multiple_of(hidden));
        Self { values, hidden }
    }

    /// Returns the rows of each slot, of a whole sequence `[L, H]`: of each image its features, as far as no cut goes through
    /// them.
    ///
    /// # Errors
    /// [`Error::Argument`] if rows and plan do not have the same length, or a slot is not inside.
    pub fn of_slots(&self, plan: &SequencePlan) -> Result<Vec<Self>> {
        if self.len() != plan.len() {
            return Err(Error::argument(
                format!("the sequence has {} rows, and its plan {} positions", self.len(), plan.len()),
                "Give the rows that were encoded by this plan",
            ));
        }
        let rows = |slot: &Slot| {
            let end =
                slot.offset.checked_add(slot.len).filter(|&end| end <= self.len()).ok_or_else(|| {
                    Error::argument(
                        format!("{slot:?} is not inside the {} positions of its plan", self.len()),
                        "Use a plan as it was made",
                    )
                })?;
            Ok(Self { values: &self.values[slot.offset * self.hidden..end * self.hidden], ..*self })
        };
        plan.slots.iter().map(rows).collect()
    }

    /// Returns **R**, the number of rows.
    pub fn len(&self) -> usize {
        self.values.len() / self.hidden
    }

    /// Returns whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Returns **H**, the elements of a row.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Returns all elements, shape `[R, H]`.
    pub fn values(&self) -> &'a [f16] {
        self.values
    }

    /// Returns the elements' bytes, little-endian.
    pub fn bytes(&self) -> &'a [u8] {
        bytemuck::cast_slice(self.values)
    }

    /// Returns the SHA-256 of the elements' bytes, in hexadecimal: a name that equal rows share.
    pub fn digest(&self) -> String {
        sha256(self.bytes())
    }
}

/// SHA-256, in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(Sha256::digest(bytes))
}

/// A digest's bytes in hexadecimal.
pub(crate) fn hex(digest: impl IntoIterator<Item = u8>) -> String {
    digest.into_iter().map(|byte| format!("{byte:02x}")).collect()
}
