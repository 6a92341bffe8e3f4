package proxy

import (
	"net/http"
	"net/url"
	"strconv"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tidemark/audit"
	"tidemark/proxy/oci"
)

// The annotations of an entry of a tag's history. The first is the one that
// distribution-spec#606 proposes; here it is the time at which the digest was
// first seen, which is later than it was pushed.
const (
	tagCreated   = "org.opencontainers.tag.created"
	tagDeleted   = "org.opencontainers.tag.deleted"
	tagNotBefore = "dev.tidemark.tag.not_before"
	tagEnded     = "dev.tidemark.tag.ended"
	tagIndex     = "dev.tidemark.log.index"
	tagBasis     = "dev.tidemark.basis"
)

const (
	historyPage = 100
	historyMost = 1000
)

// tagHistory answers with what a tag meant, newest first, in the shape that
// distribution-spec#606 proposes: descriptors with times. It is the ledger's own
// answer; upstream is not asked.
func (h *Handler) tagHistory(w http.ResponseWriter, r *http.Request, repo repository, req oci.Request, p *Pull) error {
	if req.Kind == oci.OCITagHistory && !h.o.OCITagHistory {
		return &oci.Error{Status: http.StatusNotFound, Code: oci.Unsupported, Message: "audit.oci_tag_history is off; the same is at _tidemark/tag-history"}
	}
	query := r.URL.Query()
	q, err := historyQuery(query)
	if err != nil {
		return err
	}
	if err := repo.mayRead(r.Context(), oci.Manifest, req.Tag, ""); err != nil {
		return err
	}
	n := q.Limit
	q.Limit++ // one more tells whether there is a next page
	if repo.view != nil {
		q = upTo(q, repo.view.moment)
	}
	stints, err := h.o.History(r.Context(), repo.ref(req.Tag), q)
	if err != nil {
		return err
	}
	if len(stints) == 0 && q.Before == nil && q.SeenBefore.IsZero() {
		return &oci.Error{Status: http.StatusNotFound, Code: oci.ManifestUnknown, Message: "this tag was never seen here", Detail: detail{Upstream: repo.Upstream}}
	}
	list := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	list.SchemaVersion = 2
	for _, st := range stints {
		if len(list.Manifests) == n {
			query.Set("n", strconv.Itoa(n))
			query.Set("last", list.Manifests[n-1].Annotations[tagIndex])
			w.Header().Set("Link", "<"+r.URL.EscapedPath()+"?"+query.Encode()+`>; rel="next"`)
			break
		}
		list.Manifests = append(list.Manifests, stintDescriptor(st))
	}
	return writeList(w, r, p, ocispec.MediaTypeImageIndex, list)
}

func historyQuery(query url.Values) (q audit.HistoryQuery, err error) {
	q.Limit = historyPage
	if s := query.Get("n"); s != "" {
		if q.Limit, err = strconv.Atoi(s); err != nil || q.Limit < 1 || q.Limit > historyMost {
			return q, badQuery("n is not a number from 1 to " + strconv.Itoa(historyMost))
		}
	}
	if s := query.Get("before"); s != "" {
		if q.SeenBefore, err = time.Parse(time.RFC3339, s); err != nil {
			return q, badQuery("before is not a time such as 2026-07-01T12:00:00Z")
		}
	}
	if s := query.Get("last"); s != "" {
		index, err := strconv.ParseInt(s, 10, 64)
		if err != nil || index < 0 {
			return q, badQuery("last is not the index of an entry")
		}
		q.Before = &index
	}
	return q, nil
}

// upTo bounds a query by a moment.
func upTo(q audit.HistoryQuery, m audit.Moment) audit.HistoryQuery {
	if at, ok := m.Time(); ok {
		if after := at.Add(time.Millisecond); q.SeenBefore.IsZero() || q.SeenBefore.After(after) {
			q.SeenBefore = after
		}
	} else if index, _ := m.Index(); q.Before == nil || *q.Before > index {
		index++
		q.Before = &index
	}
	return q
}

func badQuery(message string) error {
	return &oci.Error{Status: http.StatusBadRequest, Code: oci.Unsupported, Message: message}
}

func stintDescriptor(st audit.Stint) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: st.MediaType, Digest: st.Digest, Size: st.Size, Annotations: map[string]string{
		tagCreated: st.FirstSeen.Format(time.RFC3339Nano),
		tagIndex:   strconv.FormatInt(st.Index, 10),
		tagBasis:   st.Basis,
	}}
	if st.NotBefore != nil {
		d.Annotations[tagNotBefore] = st.NotBefore.Format(time.RFC3339Nano)
	}
	if st.Ended != nil {
		d.Annotations[tagEnded] = st.Ended.Format(time.RFC3339Nano)
		if st.EndReason == string(audit.Deleted) {
			d.Annotations[tagDeleted] = d.Annotations[tagEnded]
		}
	}
	return d
}
