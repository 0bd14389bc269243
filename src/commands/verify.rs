//! `verify`: verifies an image as the service does.

use super::{answer, print};
use crate::cli::exit;
use crate::model::{Fault, PinnedImage, Reason, Severity, parse};
use crate::observe::Neighbours;
use crate::time;
use crate::trust::{self, TrustError};

/// Prints the result of the verification and returns the exit code.
pub(super) async fn verify(neighbours: &Neighbours, pullspec: &str, json: bool) -> u8 {
    let image: PinnedImage = match parse(pullspec) {
        Ok(image) => image,
        Err(error) => return answer(json, Reason::ImageMalformed.as_str(), &error.to_string(), exit::REFUSED),
    };
    match trust::verify(&neighbours.engine, &image).await {
        Ok(verified) => {
            let facts = verified.facts();
            print(json, facts, || {
                format!(
                    "verified {}\n  by rule      {}\n  manifest     {}\n  architecture {}\n  bootable     {}\n  \
                     built from   {}\n  created      {}\n  size         {} MiB\n  pulled as    {}\n",
                    facts.image,
                    facts.vouched_by,
                    facts.instance,
                    facts.architecture,
                    if facts.bootable { "yes" } else { "no" },
                    facts.rendered_config.as_deref().unwrap_or("(no machineconfig label)"),
                    facts.created.map_or_else(|| "(not in the config)".to_owned(), time::text),
                    facts.size >> 20,
                    verified.to_pull()
                )
            });
            0
        }
        Err(error) => {
            let code = match &error {
                TrustError::ReadPolicy { .. } => exit::UNREADABLE,
                error if error.reason().severity() == Severity::Transient => exit::NOT_YET,
                _ => exit::REFUSED,
            };
            answer(json, error.reason().as_str(), &Fault::from(&error).message, code)
        }
    }
}
