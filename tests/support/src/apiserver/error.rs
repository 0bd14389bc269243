//! Errors as `Status` objects.

use std::fmt;

use serde_json::{Value, json};

/// An error that clients get as a `Status` object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// The HTTP status.
    pub code: u16,
    /// The machine-readable reason, such as `NotFound`.
    pub reason: &'static str,
    /// The text for users.
    pub message: String,
    /// The object that the error is about.
    pub name: Option<String>,
    /// The kind of that object, in the plural.
    pub kind: &'static str,
}

impl ApiError {
    pub(super) fn new(code: u16, name: Option<&str>, message: impl Into<String>) -> Self {
        Self { code, reason: reason(code), message: message.into(), name: name.map(str::to_owned), kind: "nodes" }
    }

    pub(super) fn not_found(name: &str) -> Self {
        Self::new(404, Some(name), format!("nodes \"{name}\" not found"))
    }

    pub(super) fn forbidden(name: &str, why: &str) -> Self {
        let shown = if name.is_empty() { "nodes".to_owned() } else { format!("nodes \"{name}\"") };
        Self::new(403, Some(name).filter(|n| !n.is_empty()), format!("{shown} is forbidden: {why}"))
    }

    pub(super) fn conflict(name: &str, why: &str) -> Self {
        Self::new(409, Some(name), format!("Operation cannot be fulfilled on nodes \"{name}\": {why}"))
    }

    pub(super) fn invalid(name: &str, why: &str) -> Self {
        Self::new(422, Some(name), format!("Node \"{name}\" is invalid: {why}"))
    }

    pub(super) fn expired(asked: u64, oldest: u64) -> Self {
        Self::new(410, None, format!("too old resource version: {asked} ({oldest})"))
    }

    /// The `Status` object.
    #[must_use]
    pub fn status(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "code": self.code,
        });
        if !self.reason.is_empty() {
            status["reason"] = json!(self.reason);
        }
        if let Some(name) = &self.name {
            status["details"] = json!({"name": name, "kind": self.kind});
        }
        status
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.code, self.reason, self.message)
    }
}

impl std::error::Error for ApiError {}

fn reason(code: u16) -> &'static str {
    match code {
        400 => "BadRequest",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "NotFound",
        405 => "MethodNotAllowed",
        406 => "NotAcceptable",
        409 => "Conflict",
        410 => "Expired",
        413 => "RequestEntityTooLarge",
        415 => "UnsupportedMediaType",
        422 => "Invalid",
        429 => "TooManyRequests",
        500 => "InternalError",
        503 => "ServiceUnavailable",
        504 => "Timeout",
        _ => "",
    }
}
