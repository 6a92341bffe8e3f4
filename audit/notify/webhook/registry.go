package webhook

import (
	"encoding/json"
	"time"

	"tidemark/audit"
	"tidemark/audit/notify"
)

// What a registry tells of pushes and deletions (distribution, notifications v2), for
// those who wait for new images: a tag was pushed when clients get another digest for it.

type registryEvent struct {
	ID        string    `json:"id"`
	Timestamp time.Time `json:"timestamp"`
	Action    string    `json:"action"`
	Target    struct {
		MediaType  string `json:"mediaType,omitempty"`
		Size       int64  `json:"size,omitempty"`
		Digest     string `json:"digest,omitempty"`
		Length     int64  `json:"length,omitempty"`
		Repository string `json:"repository"`
		Tag        string `json:"tag"`
	} `json:"target"`
	Request struct {
		ID     string `json:"id"`
		Host   string `json:"host"`
		Method string `json:"method"`
	} `json:"request"`
	Actor  struct{} `json:"actor"`
	Source struct {
		InstanceID string `json:"instanceID"`
	} `json:"source"`
}

// action is what an event is for a registry, "" for nothing: what is held is no push, and
// is one when it is released.
func action(e audit.Event) string {
	switch {
	case e.Type == audit.Deleted:
		return "delete"
	case e.New == nil || e.Type != audit.Released && !e.Type.Moves():
		return ""
	case e.Policy.Served != "" && e.Policy.Served != e.New.Digest:
		return ""
	}
	return "push"
}

// registryBody is the envelope of a message's pushes and deletions, nil without any.
func registryBody(m notify.Message) ([]byte, error) {
	var out struct {
		Events []registryEvent `json:"events"`
	}
	for _, i := range m.Items {
		e := i.Event
		r := registryEvent{ID: e.ID.String(), Timestamp: e.Time, Action: action(e)}
		if r.Action == "" {
			continue
		}
		about, method := e.New, "PUT"
		if r.Action == "delete" {
			about, method = e.Old, "DELETE"
		}
		r.Target.Repository, r.Target.Tag = e.Ref.Repository, e.Ref.Tag
		if about != nil {
			r.Target.MediaType, r.Target.Size, r.Target.Length, r.Target.Digest = about.MediaType, about.Size, about.Size, about.Digest.String()
		}
		r.Request.ID, r.Request.Host, r.Request.Method = r.ID, e.Ref.Upstream, method
		r.Source.InstanceID = m.Origin
		out.Events = append(out.Events, r)
	}
	if out.Events == nil {
		return nil, nil
	}
	return json.Marshal(out)
}
