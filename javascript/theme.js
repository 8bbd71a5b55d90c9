// Dark or light: from --theme, unless the URL says otherwise (?__theme=dark).
"use strict";

(() => {
    const wanted = window.webuiTheme;
    const address = new URL(window.location.href);
    if ((wanted === "dark" || wanted === "light") && !address.searchParams.has("__theme")) {
        onUiLoaded(() => document.body.classList.toggle("dark", wanted === "dark"));
    }
})();
