//! The texts of chat templates.

/// The text in a prompt that stands for an image, of [`XCOMPOSER2`](super::XCOMPOSER2); of other families,
/// [`Profile::marker`](super::Profile::marker). Not a token: it is split out before tokenisation.
pub const MARKER: &str = "<ImageHere>";

/// Upstream's default system text, without the trailing newline that only its batch demos add.
pub const DEFAULT_META_INSTRUCTION: &str = "\
You are an AI assistant whose name is InternLM-XComposer (浦语·灵笔).
- InternLM-XComposer (浦语·灵笔) is a multi-modality conversational language model that is developed by \
Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.
- InternLM-XComposer (浦语·灵笔) can understand and communicate fluently in the language chosen by the user \
such as English and 中文.
- InternLM-XComposer (浦语·灵笔) is capable of comprehending and articulating responses effectively based on \
the provided image.";

/// A chat template: what stands around the texts of a conversation.
///
/// No two texts are neighbours: something stands after a system text, between a query and its answer, and after that.
#[derive(Debug)]
pub(crate) struct Template {
    /// The system text where none is given; none if empty.
    pub meta: &'static str,
    /// Before and after the system text.
    pub around_meta: [&'static str; 2],
    /// Before and after a query; the last is what the model goes on from.
    pub around_query: [&'static str; 2],
    /// Before and after an answer.
    pub around_answer: [&'static str; 2],
    /// Control tokens in it, which the tokenizer must have.
    pub tokens: &'static [&'static str],
    /// One BOS in front of everything, also of an image, and no other.
    pub leading_bos: bool,
}

/// ```text
///  «146»system\n META «145»\n │ «146»user\n Q «145»\n«146»assistant\n A «145»\n │ … │ «146»user\n QUERY «145»\n«146»assistant\n
/// ```
/// with `«n»` for `[UNUSED_TOKEN_n]`.
pub(super) const XCOMPOSER2: Template = Template {
    meta: DEFAULT_META_INSTRUCTION,
    around_meta: ["[UNUSED_TOKEN_146]system\n", "[UNUSED_TOKEN_145]\n"],
    around_query: ["[UNUSED_TOKEN_146]user\n", "[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"],
    around_answer: ["", "[UNUSED_TOKEN_145]\n"],
    tokens: &["[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"],
    leading_bos: false,
};

/// ```text
///  META ␣ │ USER:␣ Q ␣ASSISTANT:␣ A ␣ │ … │ USER:␣ QUERY ␣ASSISTANT:
/// ```
/// as the chat template beside the published weights has it: no system text of its own, and no `</s>` after an answer.
pub(super) const VICUNA: Template = Template {
    meta: "",
    around_meta: ["", " "],
    around_query: ["USER: ", " ASSISTANT:"],
    around_answer: [" ", " "],
    tokens: &[],
    leading_bos: true,
};
