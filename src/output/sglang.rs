//! What SGLang's engine takes as `precomputed_embedding`: ids, and the rows of all images in one tensor.
//!
//! ```text
//!   input_ids     [1, 92543, …, t, t, … t, 1, 328, …]                  list of L ints, t in image rows
//!   image_data    [{"format": "precomputed_embedding",
//!                   "feature": tensor [P + P + …, H],                  torch.float16; one entry for all images
//!                   "offsets": [(140, 1364), …]}]                      first and last position of each
//! ```
//!
//! As a file ([`torch_save`](super::torch_save)) it is read back into the call itself:
//!
//! ```python
//! arguments = torch.load("sequence.pt", weights_only=True)
//! engine.generate(**arguments, sampling_params=...)
//! ```
//!
//! SGLang allows one such entry in a request. It finds the images by `offsets`; versions that do not read these find them by
//! their token, and take images side by side for one: `t` must be the image token of the served model. The template is the
//! one of the plan, not the server's. The engine is called in Python: its HTTP API has no place for a tensor.
//!
//! A served model must leave its images to SGLang's general processor, as those of Qwen do. That of LLaVA takes every
//! `feature` for pixels, and runs its tower on it.
//!
//! # Source
//! SGLang 0.5.23, read, not copied: `python/sglang/srt/multimodal/processors/base_processor.py`
//! (`_validate_one_modality`, `process_and_combine_mm_data`, `get_mm_items_offset`), `processors/llava.py`.

use super::Rows;
use super::torch_save::{Tensor, Value};
use crate::error::{Error, Result};
use crate::prompt::SequencePlan;

/// Checks that `image_token` stands for images alone: no text of the plan has it.
///
/// # Errors
/// [`Error::Argument`] naming the position.
pub fn check(plan: &SequencePlan, image_token: u32) -> Result<()> {
    match plan.input_ids.iter().position(|&id| id == i64::from(image_token)) {
        None => Ok(()),
        Some(at) => Err(Error::argument(
            format!("position {at} is text and has the id {image_token}, which is to mean an image"),
            "Give the image token of the served model, and keep it out of the text",
        )),
    }
}

/// Returns the arguments of `Engine.generate` for a sequence `[L, H]`, as a dictionary; the rows stay where they lie.
/// `image_token` is what the served model calls its image token. Without images, `image_data` is `None`.
///
/// # Errors
/// [`Error::Argument`] if rows and plan do not have the same length, or as [`check`].
pub fn arguments<'a>(plan: &SequencePlan, sequence: Rows<'a>, image_token: u32) -> Result<Value<'a>> {
    check(plan, image_token)?;
    let rows = sequence.of_slots(plan)?;
    let parts: Vec<_> = rows.iter().map(Rows::values).collect();
    let count = rows.iter().map(Rows::len).sum();
    let feature = Tensor::f16(vec![count, sequence.hidden()], &parts)?;
    let there = plan.slots.iter().filter(|slot| slot.len > 0);
    let ends = there.map(|slot| [slot.offset, slot.offset + slot.len - 1].map(|at| Value::Int(at as i64)));
    let offsets = ends.map(|ends| Value::Tuple(ends.to_vec())).collect();
    let images = match count {
        0 => Value::None,
        _ => Value::List(vec![Value::Dict(vec![
            ("format", Value::Text("precomputed_embedding")),
            ("feature", feature.into()),
            ("offsets", Value::List(offsets)),
        ])]),
    };
    Ok(Value::Dict(vec![("input_ids", Value::ints(plan.ids_with(image_token))), ("image_data", images)]))
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::output::testkit::plan;

    #[test]
    fn all_images_are_one_tensor_and_their_rows_one_id() {
        let values = [f16::ONE; 15];
        let rows = Rows::new(&values, 3).unwrap();
        let text = format!("{:?}", arguments(&plan(), rows, 8).unwrap());
        let expected = r#"Dict([("input_ids", List([Int(1), Int(7), Int(8), Int(8), Int(9)])), ("image_data", List([Dict([("format", Text("precomputed_embedding")), ("feature", Tensor(Tensor { shape: [2, 3], "#;
        assert!(text.starts_with(expected), "{text}");
        let offsets = r#"("offsets", List([Tuple([Int(2), Int(3)])]))])]))])"#;
        assert!(text.ends_with(offsets), "{text}");
        let message = arguments(&plan(), rows, 9).unwrap_err().to_string();
        assert!(message.contains("position 4 is text and has the id 9"), "{message}");
    }
}
