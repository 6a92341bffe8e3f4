package admin

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"filippo.io/torchwood"

	"tidemark/audit"
	"tidemark/audit/taglog"
)

// The log as c2sp.org/tlog-tiles lays it out, below /log. Nothing is shown that
// is not signed: what a tile says can be checked against the checkpoint.

func (h *Handler) checkpoint(w http.ResponseWriter, _ *http.Request) {
	signed := h.o.Signer.Last()
	if len(signed.Note) == 0 {
		why := "nothing was signed yet"
		if err := h.o.Signer.Err(); err != nil {
			why = "nothing is signed: " + err.Error()
		}
		writeError(w, &Error{http.StatusNotFound, "not_signed", why})
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-cache")
	_, _ = w.Write(signed.Note)
}

func (h *Handler) vkey(w http.ResponseWriter, _ *http.Request) {
	vkey := h.o.Signer.VKey()
	if vkey == "" {
		writeError(w, &Error{http.StatusNotFound, "not_found", audit.ErrNoKey.Error()})
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintln(w, vkey)
}

func (h *Handler) proof(w http.ResponseWriter, r *http.Request) {
	index, err := strconv.ParseInt(r.PathValue("index"), 10, 64)
	if err != nil || index < 0 {
		writeError(w, badRequest("index %.50q is not the index of an entry", r.PathValue("index")))
		return
	}
	signed := h.o.Signer.Last()
	if index >= signed.Tree.N {
		writeError(w, &Error{http.StatusNotFound, "not_signed", fmt.Sprintf("entry %d is not signed yet, %d are", index, signed.Tree.N)})
		return
	}
	proof, err := taglog.Proof(index, signed.Tree, signed.Note, h.o.Entries)
	if err != nil {
		writeError(w, err)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = w.Write(proof)
}

// tile answers tiles of hashes and bundles of entries, full or partial.
func (h *Handler) tile(w http.ResponseWriter, r *http.Request) {
	t, err := torchwood.ParseTilePath(strings.TrimPrefix(r.URL.Path, "/log/"))
	if err != nil {
		writeError(w, badRequest("%.200q is not a tile: want /log/tile/<level>/<number>[.p/<width>]", r.URL.Path))
		return
	}
	level := max(t.L, 0) // bundles of entries are numbered like the tiles of level 0
	if covered := h.o.Signer.Last().Tree.N >> (torchwood.TileHeight * level); t.N*torchwood.TileWidth+int64(t.W) > covered {
		writeError(w, &Error{http.StatusNotFound, "not_found", "the signed tree has no such tile"})
		return
	}
	body, err := audit.Tiles{Hashes: h.o.Entries, Leaves: h.o.Entries}.Tile(r.Context(), t)
	if err != nil {
		writeError(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Cache-Control", "max-age=31536000, immutable")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = w.Write(body)
}
