package diff

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// imageConfig is an image's configuration: what the image specification has,
// and what Docker adds.
type imageConfig struct {
	ocispec.Image
	Config struct {
		ocispec.ImageConfig
		Healthcheck *healthcheck `json:"Healthcheck,omitempty"`
		Shell       []string     `json:"Shell,omitempty"`
		OnBuild     []string     `json:"OnBuild,omitempty"`
	} `json:"config"`
}

// healthcheck is Docker's; times are nanoseconds.
type healthcheck struct {
	Test        []string `json:",omitempty"`
	Interval    int64    `json:",omitempty"`
	Timeout     int64    `json:",omitempty"`
	StartPeriod int64    `json:",omitempty"`
	Retries     int      `json:",omitempty"`
}

func (h *healthcheck) text() *string {
	if h == nil {
		return nil
	}
	masked := *h
	masked.Test = maskAll(h.Test)
	return encoded(masked)
}

func compareConfigs(o, n *imageConfig) *Config {
	c := &Config{
		Changed: true, Fields: []FieldChange{}, Labels: []FieldChange{},
		SameDiffIDs: slices.Equal(o.RootFS.DiffIDs, n.RootFS.DiffIDs),
		History:     Counts{len(o.History), len(n.History)},
	}
	a, b := o.Config, n.Config
	c.mapped("Env", env(a.Env), env(b.Env))
	c.single("Entrypoint", list(a.Entrypoint), list(b.Entrypoint))
	c.single("Cmd", list(a.Cmd), list(b.Cmd))
	c.single("User", text(a.User), text(b.User))
	c.single("WorkingDir", text(a.WorkingDir), text(b.WorkingDir))
	c.mapped("ExposedPorts", keys(a.ExposedPorts), keys(b.ExposedPorts))
	c.mapped("Volumes", keys(a.Volumes), keys(b.Volumes))
	c.single("StopSignal", text(a.StopSignal), text(b.StopSignal))
	c.single("Healthcheck", a.Healthcheck.text(), b.Healthcheck.text())
	c.single("Shell", list(a.Shell), list(b.Shell))
	c.single("OnBuild", list(a.OnBuild), list(b.OnBuild))
	for _, key := range slices.Sorted(maps.Keys(union(a.Labels, b.Labels))) {
		was, had := a.Labels[key]
		is, has := b.Labels[key]
		if had && has && was == is {
			continue
		}
		c.Labels = append(c.Labels, FieldChange{Field: key, Old: masked(key, was, had), New: masked(key, is, has)})
	}
	if o.Created != nil || n.Created != nil {
		c.Created = &Created{utc(o.Created), utc(n.Created)}
	}
	for i, h := range n.History {
		if i >= len(o.History) || o.History[i].CreatedBy != h.CreatedBy {
			c.FirstStep = mask(h.CreatedBy)
			break
		}
	}
	return c
}

// compareIdentities compares what images say that they are.
func compareIdentities(a, b map[string]string) (out []FieldChange) {
	for _, key := range identity {
		was, had := a[key]
		is, has := b[key]
		if had || has {
			out = append(out, FieldChange{Field: key, Old: masked(key, was, had), New: masked(key, is, has)})
		}
	}
	return out
}

// identity are the labels that say what an image is and where it comes from.
var identity = []string{
	ocispec.AnnotationSource, ocispec.AnnotationRevision, ocispec.AnnotationVersion, ocispec.AnnotationBaseImageName, ocispec.AnnotationBaseImageDigest,
}

func utc(t *time.Time) *time.Time {
	if t == nil {
		return nil
	}
	u := t.UTC()
	return &u
}

func union(a, b map[string]string) map[string]string {
	u := maps.Clone(a)
	if u == nil {
		u = make(map[string]string)
	}
	maps.Copy(u, b)
	return u
}

// single notes a field of one value.
func (c *Config) single(field string, old, new *string) {
	if old == nil && new == nil || old != nil && new != nil && *old == *new {
		return
	}
	c.Fields = append(c.Fields, FieldChange{Field: field, Old: old, New: new})
}

// mapped notes a field of many values, each by its key.
func (c *Config) mapped(field string, old, new map[string]string) {
	for _, key := range slices.Sorted(maps.Keys(union(old, new))) {
		was, had := old[key]
		is, has := new[key]
		if had && has && was == is {
			continue
		}
		c.Fields = append(c.Fields, FieldChange{Field: field, Key: key, Old: masked(key, was, had), New: masked(key, is, has)})
	}
}

func text(s string) *string {
	if s == "" {
		return nil
	}
	s = mask(s)
	return &s
}

func list(items []string) *string {
	if len(items) == 0 {
		return nil
	}
	return encoded(maskAll(items))
}

func encoded(v any) *string {
	b, err := json.Marshal(v)
	if err != nil {
		panic("diff: " + err.Error())
	}
	s := string(b)
	return &s
}

func env(vars []string) map[string]string {
	m := make(map[string]string, len(vars))
	for _, v := range vars {
		key, value, _ := strings.Cut(v, "=")
		m[key] = value
	}
	return m
}

func keys(m map[string]struct{}) map[string]string {
	out := make(map[string]string, len(m))
	for k := range m {
		out[k] = ""
	}
	return out
}

// signal notes what deserves a look.
func (c *Config) signal(out map[string]bool) {
	for _, f := range c.Fields {
		switch f.Field {
		case "Entrypoint":
			out["entrypoint_changed"] = true
		case "Cmd":
			out["cmd_changed"] = true
		case "User":
			if f.New == nil || *f.New == "root" || strings.HasPrefix(*f.New, "0") {
				out["user_to_root"] = true
			}
		case "Env":
			if f.New != nil && (f.Key == "LD_PRELOAD" || f.Key == "PATH" || f.Key == "LD_LIBRARY_PATH") {
				out["env_added:"+f.Key] = true
			}
		case "ExposedPorts":
			out["ports_changed"] = true
		case "Volumes":
			if f.Old == nil {
				out["volume_added"] = true
			}
		}
	}
	for _, f := range c.Identity {
		if f.Field == ocispec.AnnotationSource && (f.Old == nil || f.New == nil || *f.Old != *f.New) {
			out["source_changed"] = true
		}
		if f.Field == ocispec.AnnotationRevision && f.New == nil {
			out["revision_missing"] = true
		}
	}
	if t := c.Created; t != nil && t.New != nil {
		switch {
		case t.New.Year() <= 1980:
			out["created_epoch"] = true
		case t.Old != nil && t.New.Before(*t.Old):
			out["created_regressed"] = true
		}
	}
}
