//! Names that lead somewhere or nowhere, and rows of what is on disk.

use super::*;

pub(in crate::template) fn manifest(layer: &str) -> Manifest {
    Manifest::of_recipe(&Recipe::built_in("base").unwrap(), vec![layer.to_owned()])
}

pub(in crate::template) async fn opened() -> (tempfile::TempDir, Templates) {
    let data_dir = tempfile::tempdir().unwrap();
    let store = Store::open(data_dir.path()).unwrap();
    let config = TemplateConfig {
        data_dir: data_dir.path().to_owned(),
        archive: None,
        debian_mirror: None,
        debian_security_mirror: None,
        cache_dir: None,
        limits: super::super::UnpackLimits::default(),
        images: super::super::ImageSettings::default(),
    };
    (data_dir, Templates::open(config, store))
}

impl Templates {
    pub(in crate::template) async fn register(&self, manifest: Manifest) -> Resolved {
        self.store.write(move |db| register(db, &manifest, now())).await.unwrap()
    }
}

#[tokio::test]
async fn a_template_is_found_by_name_team_tag_and_id() {
    let (_data_dir, templates) = opened().await;
    let base = templates.register(manifest("first")).await;
    let build_tag = format!("base:{}", base.build.id);
    for name in ["base", "BASE", "base:default", "anyone/base", "anyone/base:default", base.template.id.as_str(), &build_tag] {
        assert_eq!(templates.resolve(name).await.unwrap(), base, "{name}");
    }
    assert_eq!(templates.list().await.unwrap(), std::slice::from_ref(&base.template));
    assert_eq!(templates.get(base.template.id).await.unwrap(), (base.template.clone(), vec![base.build.clone()]));
    assert_eq!(templates.build(base.build.id).await.unwrap(), base.build);
}

#[tokio::test]
async fn a_name_that_leads_nowhere_is_told_by_what_is_missing() {
    let (_data_dir, templates) = opened().await;
    templates.register(manifest("first")).await;
    let message = async |name: &str| templates.resolve(name).await.unwrap_err().to_string();
    assert_eq!(message("bsae").await, "template 'bsae' not found");
    assert_eq!(message("base:v2").await, "tag 'v2' does not exist for template 'base'");
    assert_eq!(message("base:").await, "template name 'base:' is malformed: a tag has 1 to 128 letters, digits, '-', '_' and '.'");
    assert_eq!(message("../etc/x").await, "template name '../etc/x' is malformed: it has more than one '/'");
    assert_eq!(message(":x").await, "template name ':x' is malformed: a name has 1 to 128 characters");
}

#[tokio::test]
async fn a_removed_template_is_unknown_by_every_name() {
    let (_data_dir, templates) = opened().await;
    let base = templates.register(manifest("first")).await;
    templates.remove("base:default").await.unwrap();
    for name in ["base", base.template.id.as_str()] {
        assert_eq!(templates.remove(name).await.unwrap_err().to_string(), format!("template '{name}' not found"));
    }
    assert_eq!(templates.list().await.unwrap(), []);
}

#[tokio::test]
async fn registering_again_changes_nothing_and_new_content_is_a_new_build() {
    let (_data_dir, templates) = opened().await;
    let first = templates.register(manifest("first")).await;
    assert_eq!(templates.register(manifest("first")).await, first);
    let second = templates.register(manifest("second")).await;
    assert_eq!(second.template.id, first.template.id);
    assert_ne!(second.build.id, first.build.id);
    assert_eq!(templates.resolve("base").await.unwrap().build, second.build);
    let old = format!("base:{}", first.build.id);
    assert_eq!(templates.resolve(&old).await.unwrap().build, first.build, "an old build stays for what runs on it");
}
