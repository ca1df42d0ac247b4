package control

import (
	"net/http"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
)

// theOwner is the one user that there is; every key is his.
func (s *Server) theOwner() wire.User {
	return wire.User{
		ID: s.ownerID(), Username: owner, Name: owner, Email: owner + "@localhost", Status: "active", LoginType: "token",
		OrganizationIDs: []uuid.UUID{s.organizationID()}, Roles: []wire.Role{{Name: "owner", DisplayName: "Owner"}},
	}
}

// onUser lets people in if the path names the one user.
func (s *Server) onUser(next http.HandlerFunc) guarded {
	return s.forUser(func(w http.ResponseWriter, r *http.Request) {
		if !s.isOwner(r.PathValue("user")) {
			writeError(w, noResource())
			return
		}
		next(w, r)
	})
}

func (s *Server) getUser(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, s.theOwner())
}

// getFirstUser tells clients that log in that there is somebody to log in as.
func getFirstUser(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, wire.Error{Message: "The initial user has already been created!"})
}

func (s *Server) getUserGitSSHKey(w http.ResponseWriter, r *http.Request) {
	key, err := s.gitSSHKey(r.Context())
	if err != nil {
		writeError(w, internalError(err))
		return
	}
	writeJSON(w, http.StatusOK, wire.UserSSHKey{UserID: s.ownerID(), PublicKey: key.PublicKey})
}

// getTemplateVersion describes the one template that workspaces are built from.
func (s *Server) getTemplateVersion(w http.ResponseWriter, r *http.Request) {
	id, ok := pathUUID(w, r, "version")
	if !ok {
		return
	}
	if id != s.versionID() {
		writeError(w, noResource())
		return
	}
	user := s.theOwner()
	writeJSON(w, http.StatusOK, wire.TemplateVersion{
		ID: id, TemplateID: s.templateID(), OrganizationID: s.organizationID(), Name: versionName,
		Message: "An agent that the control server was told of", Job: s.job(id, user.CreatedAt), CreatedBy: user,
	})
}

func (s *Server) getAppearance(w http.ResponseWriter, _ *http.Request) {
	look := wire.Appearance{ApplicationName: "berth", AnnouncementBanners: []wire.Banner{}, SupportLinks: []string{}}
	if banners := s.banners.Load(); banners != nil {
		for _, b := range *banners {
			look.AnnouncementBanners = append(look.AnnouncementBanners, wire.Banner{Enabled: true, Message: b.Message, BackgroundColor: b.Color})
		}
	}
	writeJSON(w, http.StatusOK, look)
}

// getAppHost says that apps have no host names of their own here.
func getAppHost(w http.ResponseWriter, _ *http.Request) { writeJSON(w, http.StatusOK, wire.AppHost{}) }
