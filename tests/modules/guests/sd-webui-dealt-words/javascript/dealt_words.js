onUiLoaded(() => console.log("dealt words"));
